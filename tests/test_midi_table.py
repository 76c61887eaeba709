"""The cases of the paper's MIDI page: windows, rows, the page; and models of notes that obey, or do not."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from subtractive_jax.errors import UserError
from subtractive_jax.evaluation import control, midi_control, midi_table, table
from subtractive_jax.evaluation.midi_table import CASES, OTHER, OURS, PAGE, REAL, RULE
from subtractive_jax.evaluation.paper_table import UnavailableError
from subtractive_jax.representation.notes import NOTE, read_score
from subtractive_jax.representation.piano_roll import PianoRoll
from tests import synthetic, worlds

BEAT = 480
CONFIG = worlds.notes_config()
ROLL = PianoRoll.from_config(CONFIG.representation)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.write_note_windows(folder, CONFIG, dict(train=32, test=24))
    return folder


@pytest.fixture(scope="module")
def bass(data_dir):
    return midi_table.read_windows(data_dir, "test", "bass", 6, ("guitar",))


def example(song, stem, **about):
    known = {"stem_name": stem, "group_id": "a", "instructions": ["Add it"], "tags": '{"genre": "funk"}'}
    return {"mix": synthetic.window_of_notes(song), **known, **about}


def test_windows_begin_at_their_bar_line():
    song = {
        "bass": [(-0.5, 1.0, 40), (-0.05, 1.0, 41), (1.0, 1.0, 42)],  # from before, a little early, and within
        "guitar": [(-1.0, 0.5, 60), (-0.5, 1.0, 61), (2.0, 1.0, 62)],
        "drums": [(0.0, 0.1, 36)],
    }
    window = midi_table._window(example(song, "bass"), ROLL, ("guitar",))
    assert (window.stem["start"] / BEAT).tolist() == [0.0, 1.0] and window.genre == "funk"
    assert window.bars.tolist() == [0, 4 * BEAT, 8 * BEAT, 12 * BEAT, 16 * BEAT] and window.end == 16 * BEAT
    assert window.context.parts.keys() == {"guitar"}
    assert (window.context.parts["guitar"]["start"] / BEAT).tolist() == [-1.0, -0.5, 2.0]
    file = read_score(window.context.content)
    assert file.parts.keys() == {"guitar"} and file.metres == window.context.metres == ((0, 4, 4),)
    assert (file.parts["guitar"]["start"] / BEAT).tolist() == [0.0, 2.0]
    everything = midi_table._window(example(song, "bass"), ROLL, ())
    assert everything.context.parts.keys() == {"guitar", "drums"}
    assert everything.harmony["pitch"].tolist() == [60, 61, 62]


def test_windows_have_what_is_given(data_dir, bass):
    assert len(bass) == 6 and {window.stem_name for window in bass} == {"bass"}
    assert all(window.context.parts.keys() == {"guitar"} for window in bass)
    assert len(midi_table.read_windows(data_dir, "test", "drums", 3)) == 3
    with pytest.raises(UserError, match="0 windows without bass and with vocals"):
        midi_table.read_windows(data_dir, "test", "bass", 6, ("vocals",))


def test_audio_is_refused(tmp_path):
    synthetic.write_windows(tmp_path, worlds.small_config())
    with pytest.raises(UserError, match="a dataset of audio; build one with configs/midi_tiny.py"):
        midi_table.read_windows(tmp_path, "train", "drums", 2)


def test_another_songs_part_is_of_another_group_and_in_this_songs_ticks(bass):
    slow = dataclasses.replace(bass[1].context, ticks_per_beat=2 * BEAT)
    twice = bass[1].stem.copy()
    twice["start"] *= 2
    twice["end"] *= 2
    first, second, *_ = windows = [bass[0], dataclasses.replace(bass[1], context=slow, stem=twice), *bass[2:]]
    parts = midi_table.other_parts(windows)
    assert first.group_id != second.group_id
    np.testing.assert_array_equal(parts[0], bass[1].stem)
    with pytest.raises(UnavailableError, match="one group"):
        midi_table.other_parts([dataclasses.replace(window, group_id="a") for window in bass])


def test_figures_of_a_part(data_dir, bass):
    known = midi_table.read_known(data_dir, ["bass"])["bass"]
    window = bass[0]
    real = midi_table.figures(window.stem, window, known)
    assert real["real_chroma"] == pytest.approx(1.0) and real["real_groove"] == pytest.approx(1.0)
    assert real["density"] == real["register"] == real["duration"] == real["empty"] == 0.0
    assert real["in_harmony"] == 1.0 and real["novel_bars"] == real["novel"] == 0.0  # the train split has all rhythms
    moved = window.stem.copy()
    moved["pitch"] += 1
    wrong = midi_table.figures(moved, window, known)
    assert wrong["in_harmony"] == wrong["real_chroma"] == 0.0 and wrong["register"] == pytest.approx(1.0)
    assert wrong["real_groove"] == pytest.approx(1.0) and wrong["novel"] == 0.0  # transposed, it is the same copy
    moved["pitch"][::3] += 5
    assert midi_table.figures(moved, window, known)["novel"] == 1.0
    nothing = midi_table.figures(window.stem[:3], window, known)
    assert nothing.pop("empty") == 1.0 and np.isnan(list(nothing.values())).all()


def test_drums_have_no_harmony_and_drums_give_none(data_dir):
    known = midi_table.Known(frozenset(), frozenset())
    drums = midi_table.read_windows(data_dir, "test", "drums", 2, ("bass", "guitar"))[0]
    figures = midi_table.figures(drums.stem, drums, known)
    assert np.isnan([figures[name] for name in ("in_harmony", "chroma_agreement", "real_chroma", "register")]).all()
    guitar = midi_table.read_windows(data_dir, "test", "guitar", 2, ("drums",))[0]
    figures = midi_table.figures(guitar.stem, guitar, known)
    assert np.isnan(figures["in_harmony"]) and figures["real_chroma"] == pytest.approx(1.0)
    assert len(midi_table.by_rule(guitar)) and len(midi_table.by_rule(drums))


def test_rows_of_a_case(bass):
    empty = np.zeros(0, NOTE)
    parts = {
        REAL: [window.stem for window in bass],
        RULE: [midi_table.by_rule(window) for window in bass],
        OURS: [empty, *(window.stem for window in bass[1:])],
    }
    rows = midi_table.measure(bass, parts, midi_table.Known(frozenset(), frozenset()))
    assert [row.name for row in rows] == [REAL, RULE, OURS, "ours minus rule"]
    real, _, ours, difference = (row.figures for row in rows)
    assert not {"real_groove", "density"} & real.keys() and real["groove"].count == 6
    assert ours["empty"].value == pytest.approx(1 / 6) and ours["empty"].count == 6 and ours["groove"].count == 5
    assert ours["real_groove"].value == pytest.approx(1.0)
    both = np.array(
        [
            midi_table.figures(part, window, midi_table.Known(frozenset(), frozenset()))["real_groove"]
            for part, window in zip(parts[RULE][1:], bass[1:], strict=True)
        ]
    )
    assert (
        difference["real_groove"].value == pytest.approx(np.mean(1.0 - both)) and difference["real_groove"].count == 5
    )
    text = table.to_text(rows, midi_table.METRICS)
    assert "of 5" in text and "real groove" in text and "FAD" not in text
    header, *lines = table.to_csv(rows, midi_table.METRICS).splitlines()
    assert header.startswith("name,count,in_harmony_value,in_harmony_low,in_harmony_high,in_harmony_count")
    assert {line.count(",") for line in lines} == {header.count(",")}
    assert set(midi_table.METRICS) <= midi_table.DEFINITIONS.keys()


def test_groups_are_drawn_whole():
    values = np.repeat([0.0, 1.0, 1.0, 0.0], 25)
    apart = table.mean(values)
    together = table.mean(values, groups=np.repeat(list("abcd"), 25))
    assert apart.value == together.value == 0.5 and together.count == 100
    assert together.high - together.low > 3 * (apart.high - apart.low)


def evaluate(*arguments):
    command = [sys.executable, "-m", "launch.evaluate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_model_is_measured_and_shown(data_dir, tmp_path):
    model, output = worlds.notes_model(tmp_path / "model"), tmp_path / "out"
    done = evaluate(
        "--midi_table",
        f"--model={model}",
        f"--data_dir={data_dir}",
        f"--output={output}",
        "--num_windows=2",
        "--steps=1",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((output / "table.json").read_text())
    rows = {row["name"]: row for row in document["rows"]}
    names = [REAL, OTHER, RULE, OURS, f"ours minus {OTHER}", "ours minus rule"]
    assert list(rows) == [f"{case}: {name}" for case in CASES for name in names]
    assert len(PAGE) == 6 and set(PAGE) == set(CASES)
    assert {row["count"] for row in rows.values()} == {2}
    assert all(value["low"] <= value["high"] for row in rows.values() for value in row.values() if type(value) is dict)
    assert rows["guitar -> bass: rule"]["in_harmony"]["value"] == 1.0
    assert "in_harmony" not in rows["drums -> guitar: ours"] and "in_harmony" in document["definitions"]
    assert "drums -> guitar\n\n" in done.stdout and "real chroma" in done.stdout
    assert (output / "table.csv").read_text().count("\n") == 1 + len(rows)

    text = (output / "index.html").read_text()
    assert text.count("<article") == 6 == text.count('class="roll"') and "<h2>MIDI</h2>" in text
    for number in range(1, 7):
        sounds = {path.name for path in (output / f"case_{number}").iterdir()}
        assert sounds == {f"{name}.wav" for name in ("original", "without_stem", "mix", "stem", "rule")}


def test_models_of_audio_and_of_notes_have_a_table_each(data_dir, tmp_path):
    done = evaluate("--midi_table", "--model=tiny", f"--data_dir={data_dir}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 2 and "--paper_table for a model of audio" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


class Obedient:
    """Plays a bass as the text asks; sparse is every second note, and jazz is off the beat."""

    def insert_notes(self, score, text, stem, seed, steps):
        word = text.removeprefix("Add ").removesuffix(f" {stem}")
        notes = np.zeros(16, NOTE)
        notes["start"] = np.arange(16) * BEAT + (BEAT // 2 if word == "jazz" else 0)
        notes["end"] = notes["start"] + BEAT // 2
        notes["pitch"] = 52 if word == "high" else 40
        notes["velocity"] = 30 if word == "soft" else 90
        return SimpleNamespace(notes=notes[::2] if word == "sparse" else notes)


class Silent:
    def insert_notes(self, score, text, stem, seed, steps):
        return SimpleNamespace(notes=np.zeros(0, NOTE))


def test_who_obeys_in_notes(bass):
    examples = []
    for genre in ("rock", "jazz"):
        played = Obedient().insert_notes(None, f"Add {genre} bass", "bass", 0, None).notes
        examples += [dataclasses.replace(window, stem=played, genre=genre) for window in bass]
    asked = [examples[0], examples[-1]]
    trials, note = control.measure(midi_control.NoteListener(Obedient(), "bass"), asked, examples)
    figures = {trial.name: trial for trial in trials}
    assert not note and list(figures) == [
        "density: busy over sparse",
        "dynamics: loud over soft",
        "register: high over low",
        "genre: all",
        "genre: jazz",
        "genre: rock",
    ]
    assert all(trial.obeyed.value == 1.0 for trial in trials)
    assert figures["density: busy over sparse"].less.value == 0.5 and figures["genre: all"].ceiling.count == 2
    assert figures["register: high over low"].more.value == 52.0
    trials, _ = control.measure(midi_control.NoteListener(Silent(), "bass"), asked, examples)
    assert all(trial.obeyed.value == 0.0 for trial in trials)
    assert trials[2].chance == 0.0 and trials[2].more is None
    assert "register" not in {scale.name for scale in midi_control.NoteListener(Silent(), "drums").scales}
