"""Songs of MIDI to windows of notes and to piano rolls, by the same pipeline as audio."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import mido
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import midi_tiny, minimal
from data_pipeline import augment, inspect, instructions, note_windows, pipeline, sources
from subtractive_jax import fingerprint, parts, records
from subtractive_jax.errors import UserError
from subtractive_jax.representation import from_config, notes
from subtractive_jax.representation.notes import NOTE, Score, read_score
from subtractive_jax.representation.piano_roll import PianoRoll
from subtractive_jax.training.text_stage import train_tokenizer
from subtractive_jax.weights import model_folder
from tests.midi import note, saved, track, write_midi

SHIPPED = Path(sources.SHIPPED.partition(":")[2])
TPB = 480
STEPS = 64


def config_for_tests():
    config = midi_tiny.get_config()
    with config.unlocked():
        config.data.songs_per_shard = 1
        config.data.validation_fraction = config.data.test_fraction = 0.0
        config.max_text_tokens = 64
    return config


ROLL = from_config(midi_tiny.get_config().representation)
assert isinstance(ROLL, PianoRoll)


def song(bars: int = 12, beats: int = 4, **more: list[tuple[float, float, int]]) -> Score:
    """Drums, bass and keys in every beat, each beat's own pitch; `more` of (beat, end, pitch) by stem."""
    rows = {
        "drums": [(beat, beat + 0.2, 36 + 2 * (beat % 2)) for beat in range(bars * beats)],
        "bass": [(beat, beat + 0.9, 30 + beat % 13) for beat in range(bars * beats)],
        "keys": [(beat, beat + 0.9, 60 + beat % 11) for beat in range(bars * beats)],
    } | more
    own = {
        stem: np.array([(round(a * TPB), round(b * TPB), pitch, 80) for a, b, pitch in sorted(rows[stem])], NOTE)
        for stem in rows
    }
    tempos = [(0, 500_000), (5 * TPB, 400_000)]
    return read_score(notes.write(TPB, own, {}, tempos, [(0, beats, 4)], bars * beats * TPB))


def triples(score: Score, hop_bars: int = 2, min_onsets: int = 4, **more) -> list[note_windows.Triple]:
    return list(note_windows.triples(score, ROLL.parts, ROLL, hop_bars, min_onsets, **more))


def latents(score: Score, triple: note_windows.Triple) -> dict[str, np.ndarray]:
    tags = json.dumps({"stems": dict.fromkeys(score.parts)})
    return note_windows.latents(ROLL, {"mix": triple.mix, "stem_name": triple.stem_name, "tags": tags})


# Windows.


@pytest.mark.parametrize("beats", [3, 4, 5])
def test_a_window_is_its_stretch_of_the_song(beats):
    """Also of what begins before it: a held note, and an onset that is played early."""
    early, held = (4 * beats - 0.1, 4 * beats + 0.5, 80), (beats, 9 * beats, 100)
    score = song(beats=beats, keys=[early, held, *((beat, beat + 0.5, 60 + beat % 11) for beat in range(12 * beats))])
    found = triples(score)
    bars = score.bars()
    assert len({triple.start_seconds for triple in found}) == len(range(0, 12 * beats - 15, 2 * beats))
    for triple in found:
        (first,) = bars[score.seconds(bars) == triple.start_seconds]
        whole = ROLL.encode(score, first, STEPS)
        own = latents(score, triple)
        np.testing.assert_array_equal(own["mix_latent"], whole.astype(np.float16))
        np.testing.assert_array_equal(own["context_latent"][0, :, -1], ROLL.metre(score, first, STEPS))
        context, stem = (ROLL.encode(read_score(content), TPB, STEPS) for content in (triple.context, triple.stem))
        np.testing.assert_array_equal(context + stem, whole)
        np.testing.assert_array_equal(own["context_latent"][..., : ROLL.channels], context.astype(np.float16))
        np.testing.assert_array_equal(own["stem_latent"], stem.astype(np.float16))
        window = read_score(triple.mix)
        length = score.seconds(first + 16 * TPB) - score.seconds(first)
        assert float(window.seconds(17 * TPB) - window.seconds(TPB)) == pytest.approx(float(length))


def test_a_context_says_which_parts_are_missing():
    score = song()
    missing = {t.stem_name: latents(score, t)["context_latent"][0, 0, -5:-1].tolist() for t in triples(score)}
    assert missing == {"drums": [1, 0, 1, 0], "bass": [0, 1, 1, 0], "keys": [0, 0, 1, 1]}, "there is no guitar"


def test_silent_parts_and_copies_of_windows_are_left_out():
    few = [(beat, beat + 0.5, 60) for beat in (0.0, 1.0, 2.0, 20.0)]
    names = [(t.stem_name, t.start_seconds) for t in triples(song(guitar=few), hop_bars=4)]
    assert ("guitar", 0.0) not in names and len(names) == 3 * 3
    assert ("guitar", 0.0) in [(t.stem_name, t.start_seconds) for t in triples(song(guitar=few), 4, min_onsets=3)]
    alone = song()
    alone.parts.pop("bass"), alone.parts.pop("drums")
    assert triples(alone) == [], "no context"
    same = [(beat, beat + 0.5, 60) for beat in range(64)]
    looped = song(bars=16, drums=same, bass=same, keys=same)
    at = {triple.start_seconds for triple in triples(looped)}
    assert len(at) == 2, "with the change of tempo, and after it; all others are the second again"


def test_what_is_too_short_is_refused():
    assert len(triples(song(bars=4))) == 3
    with pytest.raises(UserError, match=r"shorter than one window \(12.0 of 16 beats\)"):
        triples(song(bars=3))


def test_a_stretch_that_ends_within_its_last_bar_counts():
    assert {t.start_seconds for t in triples(song(bars=4, drums=[(beat, beat + 0.1, 36) for beat in range(16)]))} == {
        0.0
    }


def test_transposition_moves_all_but_drums():
    score = song(guitar=[(beat, beat + 0.5, 126) for beat in range(48)])
    plain, moved = triples(score, 4), triples(score, 4, transposition=lambda start_seconds: 3)
    for one, other in zip(plain, moved, strict=True):
        assert (one.semitones, other.semitones) == (0, 3) and one.start_seconds == other.start_seconds
        a, b = read_score(one.mix).parts, read_score(other.mix).parts
        np.testing.assert_array_equal(a["drums"], b["drums"])
        np.testing.assert_array_equal(a["bass"]["pitch"] + 3, b["bass"]["pitch"])
        assert set(b["guitar"]["pitch"].tolist()) == {117}, "129 is no pitch"
    draws = [augment.transposition("a", second, 1, 0, 6) for second in range(300)]
    assert set(draws) == {*range(-6, 0), *range(1, 7)}
    assert draws == [augment.transposition("a", second, 1, 0, 6) for second in range(300)]
    assert augment.transposition("a", 0.0, 1, 0, 0.5) == 0


def test_tags_are_those_of_the_window():
    score = song(bars=8, bass=[(beat / 2, beat / 2 + 0.4, 28 if beat < 32 else 45) for beat in range(64)])
    low, high = (triple.tags["bass"] for triple in triples(score, 4) if triple.stem_name == "bass")
    assert low["pitch_median"] == 28 and high["pitch_median"] == 45
    assert high["onsets_per_s"] == pytest.approx(2 / 0.4) and high["vel_mean"] == 80
    drums = next(triple.tags["drums"] for triple in triples(score) if triple.stem_name == "drums")
    assert drums["pieces"] == {"kick": 8, "snare": 8} and "pitch_median" not in drums


def test_instructions_name_the_register():
    for pitch, word in ((30, "low"), (45, "high"), (37, "")):
        texts = set(instructions.every_instruction({"stems": {"bass": {"pitch_median": pitch}}}, "bass"))
        assert any(f"Add {word} bass" == text for text in texts) == bool(word)
        assert any("register" in text for text in texts) == bool(word)
    assert "Add a low bass part" in instructions.every_instruction({"stems": {"bass": {"pitch_median": 30}}}, "bass")


# The datasets.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of audio with nothing but a random text encoder."""
    config = minimal.get_config("text_encoder")
    params = {"text_encoder": parts.network("text_encoder", config).init(jax.random.key(1))}
    files = model_folder.ModelFiles(config, params, train_tokenizer(["Add drums", "Add low bass"], 256))
    folder = tmp_path_factory.mktemp("model") / "model"
    model_folder.save(folder, files, dtype="float32", card="random")
    return folder


@pytest.fixture(scope="module")
def data_dir(model, tmp_path_factory):
    """Both datasets of a shipped song that may be trained on, a held-out one, and bad files."""
    source, data_dir = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    for name in ("demo-cc0-drum-and-bass", "demo-cc0-funk"):
        shutil.copy(SHIPPED / "mid" / f"{name}.mid", source)
    (source / "damaged.mid").write_bytes(b"MThd\0\0\0\6damaged")
    (source / "alone.mid").write_bytes(saved(tracks=[track(*note(480 * 16))]))
    write_midi(
        source / "short.mid", {"drums/kit": [(0, 38)], "keys/piano": [(0, 60)]}, {"drums/kit": 9, "keys/piano": 0}
    )
    endless = [mido.Message("note_on", note=pitch, time=960) for pitch in range(60, 72)]
    drums = [message for _ in range(24) for message in note(channel=9)]
    tempo = mido.MetaMessage("set_tempo", tempo=0)
    (source / "odd.mid").write_bytes(saved(tracks=[track(tempo, *endless), track(*drums)], ticks_per_beat=480))
    arguments = (str(data_dir), [f"midi:{source}"], [])
    pipeline.build_windows(config_for_tests(), *arguments)
    pipeline.build_latents(config_for_tests(), str(data_dir), str(model), [])
    return data_dir


def test_both_datasets(data_dir):
    for split in ("train", "test"):
        windows, rolls = (records.Split(data_dir, name, split) for name in ("windows", "latents"))
        assert len(windows) == len(rolls) > 10
        for window, roll in zip(windows, rolls, strict=True):
            assert all(window[key] == roll[key] for key in window.keys() & roll.keys())
            assert window["sample_rate"] == 0 and window["gain"] == 1.0
            tags = json.loads(window["tags"])
            assert tags["stems"].keys() == read_score(window["mix"]).parts.keys()
            assert ("semitones" in tags) <= (split == "train")
            np.testing.assert_array_equal(
                roll["mix_latent"], roll["context_latent"][..., : ROLL.channels] + roll["stem_latent"]
            )
            stem = ROLL.encode(read_score(window["stem"]), read_score(window["stem"]).ticks_per_beat, STEPS)
            np.testing.assert_array_equal(roll["stem_latent"], stem.astype(np.float16))
            assert len(roll["instruction_lengths"]) == len(window["instructions"]) == 4
    train = records.Split(data_dir, "windows", "train")
    songs = {(example["song_id"], "semitones" in json.loads(example["tags"])) for example in train}
    assert songs == {(name, moved) for name in ("demo-cc0-drum-and-bass", "odd") for moved in (False, True)}


def test_what_is_refused_and_noted(data_dir):
    folder = records.dataset_dir(data_dir, "windows")
    reasons = {row["song_id"]: row["reason"] for row in map(json.loads, (folder / "rejected.jsonl").open())}
    assert reasons.keys() == {"damaged", "alone", "short"}
    assert "no window in which" in reasons["alone"] and "shorter than one window" in reasons["short"]
    told = [json.loads(line) for line in (folder / "notes.jsonl").open()]
    assert {row["note"].partition(":")[0] for row in told if row["song_id"] == "odd"} == {
        "notes without end",
        "impossible tempos or metres",
    }


def test_metadata(data_dir, model):
    metadata, config = records.read_metadata(data_dir, "latents"), config_for_tests()
    text_encoder = fingerprint.params_hash(model_folder.load(model).params["text_encoder"])
    representation = config.representation.to_dict()
    assert metadata["posterior"] == "none" and metadata["autoencoder_hash"] == ""
    assert metadata["config_hash"] == fingerprint.dataset_hash(representation, "", text_encoder, records.SCHEMA_VERSION)
    rolls = np.stack([example["stem_latent"] for example in records.Split(data_dir, "latents", "train")])
    np.testing.assert_allclose(metadata["stem_mean"], rolls.mean(axis=(0, 1, 2), dtype=np.float64), atol=1e-6)
    assert len(metadata["context_std"]) == ROLL.context_channels


def test_tfds_reads_compressed_tensors(data_dir):
    ours = records.Split(data_dir, "latents", "train")
    builder = tfds.builder_from_directory(records.dataset_dir(data_dir, "latents"))
    theirs = list(tfds.as_numpy(builder.as_dataset(split="train[:3]")))
    for index, example in enumerate(theirs):
        for key in ("mix_latent", "context_latent", "stem_latent", "instruction_states"):
            np.testing.assert_array_equal(example[key], ours[index][key])
            assert example[key].dtype == ours[index][key].dtype
    assert ours.nbytes / len(ours) < ours[0]["mix_latent"].nbytes / 4, "three of them are stored"


def test_damaged_compression_is_refused():
    feature = records.Feature("tensor", np.float16, (2,), "zlib")
    with pytest.raises(ValueError, match="header"):
        records.decode_feature(feature, [memoryview(b"none")])


def test_rebuilding_gives_the_same_bytes(data_dir, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copy(SHIPPED / "mid" / "demo-cc0-drum-and-bass.mid", tmp_path / "source")
    pipeline.build_windows(config_for_tests(), str(tmp_path), [f"midi:{tmp_path / 'source'}"], [])
    (one,) = tmp_path.glob("windows/*/windows-train.tfrecord-00000-of-00001")
    (two,) = data_dir.glob("windows/*/windows-train.tfrecord-00001-of-00004")  # after that of the song "alone"
    assert one.read_bytes() == two.read_bytes()


def test_the_page_plays_and_shows_notes(data_dir, tmp_path):
    page = inspect.write_page(str(data_dir), tmp_path, count=2, seed=0).read_text()
    assert page.count("<article") == 2 == page.count('class="roll"')
    assert len(list(tmp_path.glob("*.flac"))) == 6 == len(list(tmp_path.glob("*.mid")))
    assert read_score(tmp_path / "000_mix.mid").parts
    report = inspect.report(str(data_dir), "latents")
    assert "keys" in report and "of 2 songs" in report


def test_sources_without_notes_and_bad_configs_are_refused(tmp_path):
    (tmp_path / "stems" / "song").mkdir(parents=True)
    for stem in ("drums", "bass"):
        (tmp_path / "stems" / "song" / f"{stem}.wav").write_bytes(b"?")
    with pytest.raises(UserError, match="--source=stems:.*piano rolls are made from notes: give midi:FOLDER"):
        pipeline.build_windows(config_for_tests(), str(tmp_path), [f"stems:{tmp_path / 'stems'}"], [])
    for change, message in (
        ({"stems": ("vocals",)}, "made of config.representation.parts"),
        ({"window_hop_bars": 0}, "window_hop_bars is 0: it must be 1 or more"),
        ({"min_onsets": 0}, "min_onsets is 0"),
    ):
        config = config_for_tests()
        config.data.update(change)
        with pytest.raises(UserError, match=message):
            pipeline.build_windows(config, str(tmp_path), [], [])


def test_the_program(model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "data_pipeline.build",
        "--config=configs/midi_tiny.py",
        "--config.data.stems=('bass+drums',)",
    ]
    (tmp_path / "source").mkdir()
    shutil.copy(SHIPPED / "mid" / "demo-cc0-drum-and-bass.mid", tmp_path / "source")
    command += [f"--data_dir={tmp_path}", f"--source=midi:{tmp_path / 'source'}", f"--encoders={model}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    refused = subprocess.run(
        [*command, "--soundfont=x.sf2"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert refused.returncode == 2 and "--soundfont has no effect: for piano rolls nothing is" in refused.stderr
    splits = [records.Split(tmp_path, "latents", split) for split in records.SPLITS]
    example = next(example for split in splits for example in split)
    assert example["stem_name"] == "bass+drums"
    assert example["context_latent"][0, 0, -5:-2].tolist() == [1, 1, 1]
