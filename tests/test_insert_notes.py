"""From a song in notes to a part: the song stays as it was, parts lie where they may, windows begin at bar lines."""

import dataclasses

import numpy as np
import pytest

import subtractive_jax
from subtractive_jax.errors import UserError
from subtractive_jax.model import Model
from subtractive_jax.representation import notes as midi
from subtractive_jax.sampling import candidates, note_gates
from subtractive_jax.sampling.insert import Settings
from subtractive_jax.sampling.insert_notes import draw_notes
from subtractive_jax.sampling.windows import Windows
from subtractive_jax.weights import model_folder
from tests import worlds

BEAT = 480


def part(*notes):
    """From (start, end, pitch, velocity), in quarter notes."""
    array = np.array(
        [(round(a * BEAT), round(b * BEAT), pitch, velocity) for a, b, pitch, velocity in notes], midi.NOTE
    )
    return array[np.lexsort((array["pitch"], array["start"]))]


def song(beats=24, metres=((0, 4, 4),), stems=("drums", "bass", "keys")):
    parts = {
        "drums": part(*((beat / 2, beat / 2 + 0.25, 42, 90) for beat in range(2 * beats))),
        "bass": part(*((beat, beat + 1, 40 + beat % 5, 80 + beat % 7) for beat in range(beats))),
        "keys": part(*((beat, beat + 2, 48 + beat, 70) for beat in range(0, beats - 1, 2))),
    }
    chosen = {stem: parts[stem] for stem in stems}
    content = midi.write(BEAT, chosen, {}, [(0, 500_000)], metres, beats * BEAT)
    return midi.read_score(content)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return subtractive_jax.load(str(worlds.notes_model(tmp_path_factory.mktemp("notes") / "model")))


class Knowing(Model):
    """A model whose denoiser knows the song it is asked about."""

    def __init__(self, folder, score, stem):
        super().__init__(model_folder.load(folder), "knowing")
        self.score, self.stem = score, stem

    def denoise(self, x, context, timestep, *conditions):
        whole = self.roll.encode(self.score, 0, 4 * self.score.end // BEAT + 256)[..., self.roll.channels_of(self.stem)]
        begins, length = [], x.shape[2]
        told = self.roll.encode(self.score.without([self.stem]), 0, whole.shape[1])
        for window in context[..., : self.roll.channels] / np.float32(self.config.context_scale):
            begins.append(
                next(
                    start
                    for start in range(whole.shape[1] - length)
                    if np.array_equal(told[:, start : start + length], window)
                )
            )
        scale = np.float32(self.config.latent_scale)
        return np.stack([whole[:, begin : begin + length] * scale for begin in begins])


def test_a_perfect_denoiser_gives_the_part_back(model):
    real = song(beats=40, metres=((0, 3, 4), (9 * BEAT, 4, 4)))
    knowing = Knowing(model.name, real, "bass")
    found = knowing.insert_notes(real.without(["bass"]), "Add a bass", "bass", steps=4)
    np.testing.assert_array_equal(found.notes, real.parts["bass"])
    np.testing.assert_array_equal(midi.read_score(found.mix).parts["bass"], real.parts["bass"])


def test_the_song_comes_back_byte_for_byte_and_the_part_lies_in_it(model):
    score = song(stems=("drums", "keys"))
    found = model.insert_notes(score, "Add a funk bass", "bass", seed=3)
    assert len(found.notes) and (found.notes["start"] < score.end).all() and (found.notes["end"] <= score.end).all()
    header = 14
    assert found.mix[header:].startswith(score.content[header:])
    mix, alone = midi.read_score(found.mix), midi.read_score(found.alone)
    assert mix.parts.keys() == {"drums", "keys", "bass"} and alone.parts.keys() == {"bass"}
    assert (mix.tempos, mix.metres) == (alone.tempos, alone.metres) == (score.tempos, score.metres)
    for stem in score.parts:
        np.testing.assert_array_equal(mix.parts[stem], score.parts[stem])
    figures = found.info["figures"]
    assert figures["notes"] == len(found.notes) and 0 <= figures["harmony"] <= 1 and 0 <= figures["groove"] <= 1
    assert found.info["parts_heard"] == ["drums", "keys"]


def test_a_seed_draws_the_same_whatever_is_drawn_beside_it(model):
    score = song(stems=("drums", "keys"))
    alone = model.insert_notes(score, "Add a bass", "bass", seed=5)
    other, same = draw_notes(model, score, "Add a bass", "bass", [4, 5], Settings())
    np.testing.assert_array_equal(same.notes, alone.notes)
    assert not np.array_equal(other.notes, alone.notes)


def test_outside_of_start_and_end_the_old_part_stays(model):
    old = song(beats=48)
    (found,) = draw_notes(
        model, old.without(["bass"]), "Add a bass", "bass", [0], Settings(start=8.0, end=16.0), old=old
    )
    first, last = 16 * BEAT, 32 * BEAT

    def outside(notes):
        return notes[(notes["start"] < first) | (notes["start"] >= last)]

    np.testing.assert_array_equal(outside(found.notes), outside(old.parts["bass"]))
    inside = found.notes[(found.notes["start"] >= first) & (found.notes["start"] < last)]
    assert len(inside) and (inside["end"] <= last).all()
    assert not np.array_equal(inside, old.parts["bass"][16:32])
    without_old = model.insert_notes(old.without(["bass"]), "Add a bass", "bass", start=8.0, end=16.0)
    assert len(outside(without_old.notes)) == 0


def test_windows_begin_at_bar_lines_of_any_metre():
    lines = np.array([0, 12, 24, 36, 48, 64, 80, 96, 112])
    assert Windows.from_lines(lines, 128, 64).at == (0, 24, 48, 80)
    assert Windows.from_lines(np.array([0]), 128, 64).at == (0, 32, 64)  # one long bar
    assert Windows.from_lines(lines, 10, 64).at == (0,)
    windows = Windows.from_lines(lines, 128, 64)
    line = np.arange(windows.total, dtype=np.float32)
    np.testing.assert_allclose(windows.blend(windows.split(line, -1), -1), line, rtol=1e-6)


def test_candidates_are_ranked_and_parts_are_written_in_turn(model):
    score = song(stems=("drums",))
    found = candidates.notes_in_turn(model, score, ["Add keys", "Add a bass"], ["keys", "bass"], Settings(), 0, 2)
    assert [[one.stem for one in ranked] for ranked in found] == [["keys"] * 2, ["bass"] * 2]
    for ranked in found:
        scores = [note_gates.score(one.info["figures"]) for one in ranked]
        assert scores == sorted(scores, reverse=True)
    np.testing.assert_array_equal(found[1][0].score.parts["keys"], found[0][0].notes)


def test_figures_of_parts_worked_by_hand():
    score = song(beats=8, stems=("drums", "keys"))  # keys: 48, 50, 52, 54, two beats each
    place = (0, 8 * BEAT)
    bass = part((0, 1, 36, 90), (1, 2, 37, 90), (2, 3, 38, 90), (4, 5, 40, 90))
    figures = note_gates.figures(score, "bass", bass, place)
    assert figures["harmony"] == pytest.approx(3 / 4)
    assert figures["notes_per_beat"] == 0.5 and figures["flags"] == []
    both = note_gates.figures(score, "drums", score.parts["drums"], place)
    assert both["harmony"] is None and both["groove"] == pytest.approx(1.0)
    empty = note_gates.figures(score, "bass", bass[:0], place)
    assert empty["flags"] == ["empty"] and empty["harmony"] is empty["groove"] is None
    assert note_gates.score(empty) < note_gates.score(figures)


@pytest.mark.parametrize(
    ("stems", "arguments", "message"),
    [
        (("drums", "bass"), {}, "has a part for bass already: take it out first .*--remove"),
        (("drums",), {"stem": "base"}, 'unknown stem "base".*did you mean "bass"'),
        (("drums",), {"instruction": " "}, "the instruction is empty"),
        (("drums",), {"start": 99.0}, "0 <= start < end must hold within the song's 12.00 seconds"),
        (("drums",), {"start": 5.0, "end": 4.0}, "0 <= start < end"),
        (("drums",), {"method": "sdedit"}, "sdedit.*is for models of audio"),
        (("drums",), {"stem_gain_db": 3.0}, "stem_gain_db is for models of audio"),
        (("drums",), {"solver": "dim"}, 'did you mean "ddim"'),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(model, stems, arguments, message):
    arguments = dict(instruction="Add a bass", stem="bass") | arguments
    with pytest.raises(UserError, match=message):
        model.insert_notes(song(stems=stems), **arguments)


def test_a_song_of_nothing_that_the_model_hears_is_refused(model):
    only = midi.write(BEAT, {"vocals": part((0, 4, 60, 80))}, {}, [(0, 500_000)], [(0, 4, 4)], 4 * BEAT)
    with pytest.raises(UserError, match="the song has no drums, guitar, keys that the bass could play with"):
        model.insert_notes(midi.read_score(only), "Add a bass", "bass")


def test_models_of_notes_and_of_audio_say_what_they_are(model):
    with pytest.raises(UserError, match="reads and writes notes: give it MIDI, not audio"):
        model.insert(np.zeros(16_000, np.float32), 16_000, "Add drums")
    with pytest.raises(UserError, match="writes audio, not notes"):
        subtractive_jax.load("tiny").insert_notes(song(stems=("drums",)), "Add a bass", "bass")


def test_very_long_and_endless_songs_are_placed_quickly(model):
    score = dataclasses.replace(song(stems=("drums",)), end=1_000_000_000)
    with pytest.raises(UserError, match="within the song's"):
        model.insert_notes(score, "Add a bass", "bass", start=1e9)
