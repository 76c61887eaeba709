"""Notes to piano rolls and back."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subtractive_jax.errors import UserError
from subtractive_jax.representation import notes
from subtractive_jax.representation.notes import DRUM_KEYS, NOTE, Score, read_score
from subtractive_jax.representation.piano_roll import PianoRoll

PARTS = ("drums", "bass", "guitar", "keys")
ROLL = PianoRoll(PARTS, steps_per_beat=4, window_steps=64, lowest_pitch=16, octaves=8)
STEPS = 64
TPB = 480


def song(parts: dict[str, list[tuple[int, int, int, int]]], metres=((0, 4, 4),), ticks_per_beat: int = TPB) -> Score:
    own = {stem: np.array(sorted(rows), NOTE) for stem, rows in parts.items()}
    return read_score(notes.write(ticks_per_beat, own, {}, [(0, 500_000)], metres, 16 * ticks_per_beat))


def field(roll: np.ndarray, part: str, name: str) -> np.ndarray:
    """`[F, T, 12]`."""
    channel = (PARTS.index(part) * 4 + ("onset", "sustain", "velocity", "offset").index(name)) * 12
    return roll[..., channel : channel + 12]


@st.composite
def quantised(draw, steps_per_beat: int) -> dict[str, np.ndarray]:
    """Notes on the grid, none of which sounds into the next of its pitch."""
    ticks = 1920 // steps_per_beat
    parts = {}
    for part in draw(st.sets(st.sampled_from(PARTS), min_size=1)):
        pitches = DRUM_KEYS if part == "drums" else tuple(range(16, 112))
        rows = []
        for pitch in draw(st.sets(st.sampled_from(pitches), min_size=1, max_size=6)):
            times = draw(st.lists(st.integers(0, STEPS), min_size=2, max_size=8, unique=True))
            for start, end in itertools.pairwise(sorted(times)):
                if draw(st.booleans()) or not rows:
                    end = start + 1 if part == "drums" else end
                    rows.append((start * ticks, end * ticks, pitch, draw(st.integers(1, 127))))
        own = np.array(rows, NOTE)
        parts[part] = own[np.lexsort((own["pitch"], own["start"]))]
    return parts


@pytest.mark.parametrize("steps_per_beat", [4, 12, 16])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_quantised_song_comes_back_note_for_note(steps_per_beat, data):
    parts = data.draw(quantised(steps_per_beat))
    representation = dataclasses.replace(ROLL, steps_per_beat=steps_per_beat)
    score = read_score(notes.write(1920, parts, {}, [(0, 500_000)], [(0, 4, 4)], 100_000))
    roll = representation.encode(score, 0, STEPS)
    assert roll.shape == (8, STEPS, representation.channels) and roll.dtype == np.float32
    for part in PARTS:
        expected = parts.get(part, np.zeros(0, NOTE))
        np.testing.assert_array_equal(representation.decode(roll, part, 1920), expected)
        np.testing.assert_array_equal(representation.decode(roll.astype(np.float16), part, 1920), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 7000), st.integers(16, 111)), min_size=1, max_size=30))
def test_times_off_the_grid_are_kept(onsets):
    """Where no two onsets of a pitch are in one cell, ticks come back exactly, through float16 too."""
    cells = {}
    for tick, pitch in onsets:
        cells.setdefault(((2 * tick * 4 + TPB) // (2 * TPB), pitch), (tick, tick + 60, pitch, 80))
    score = song({"keys": list(cells.values())})
    roll = ROLL.encode(score, 0, STEPS)
    decoded = ROLL.decode(roll.astype(np.float16), "keys", TPB)
    assert (
        decoded[["start", "pitch", "velocity"]].tolist() == score.parts["keys"][["start", "pitch", "velocity"]].tolist()
    )
    assert np.abs(field(roll, "keys", "offset")).max() <= 0.5


def test_what_a_roll_holds():
    score = song({"drums": [(0, 60, 35, 127), (130, 190, 51, 64)], "bass": [(0, 240, 28, 127), (240, 300, 28, 127)]})
    roll = ROLL.encode(score, 0, 16)
    assert np.argwhere(field(roll, "drums", "onset")).tolist() == [[0, 0, 0], [0, 1, 7]]
    assert field(roll, "drums", "offset")[0, 1, 7] == pytest.approx(10 / 120)
    assert np.argwhere(field(roll, "bass", "onset")).tolist() == [[1, 0, 0], [1, 2, 0]]
    assert np.argwhere(field(roll, "bass", "sustain")).tolist() == [[1, 0, 0], [1, 1, 0], [1, 2, 0]]
    assert field(roll, "bass", "velocity")[1, 0, 0] == 1.0
    assert not field(roll, "keys", "sustain").any()


def test_windows_of_a_song_are_the_song():
    """A note belongs to the window in which its cell is, and sounds on in the next."""
    score = song({"keys": [(1900, 2400, 60, 90), (960, 4800, 64, 90)]})
    whole = ROLL.encode(score, 0, 48)
    parts = [ROLL.encode(score, first * 120, 16) for first in (0, 16, 32)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert ROLL.decode(parts[1], "keys", TPB, 1920)["start"].tolist() == [1900]


def test_pitches_outside_the_rows_are_moved_by_octaves():
    score = song({"keys": [(0, 120, 3, 90), (120, 240, 125, 90)]})
    assert ROLL.decode(ROLL.encode(score, 0, 16), "keys", TPB)["pitch"].tolist() == [27, 101]
    assert ROLL.folded(score) == 2


def test_a_mix_is_context_and_stem():
    score = song({"drums": [(0, 60, 35, 127)], "bass": [(0, 240, 28, 100)], "keys": [(0, 480, 60, 70)]})
    mix, stem = ROLL.encode(score, 0, 16), ROLL.encode(score.without(["drums", "keys"]), 0, 16)
    np.testing.assert_array_equal(ROLL.encode(score.without(["bass"]), 0, 16) + stem, mix)


def test_a_context_says_what_is_missing_and_where_the_bars_are():
    score = song({"drums": [(0, 60, 35, 127)], "bass": [(0, 240, 28, 100)]}, metres=((0, 3, 4), (1440, 6, 8)))
    roll, metre = ROLL.encode(score, 0, 24), ROLL.metre(score, 0, 24)
    assert metre[metre > 0].tolist() == [1.0, 0.5, 0.5, 1.0, 0.5] and np.flatnonzero(metre).tolist() == [
        0,
        4,
        8,
        12,
        18,
    ]
    context = ROLL.context(roll, {"bass", "guitar", "keys"}, metre)
    assert context.shape == (8, 24, ROLL.context_channels) and context.dtype == np.float32
    assert not field(context, "bass", "sustain").any() and field(context, "drums", "onset").any()
    assert (context[..., -5:-1] == (0, 1, 1, 1)).all() and (context[..., -1] == metre).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "roll"}, "representation.name"),
        ({"parts": ("drums", "flute")}, "part in representation.parts"),
        ({"parts": ("drums", "drums")}, "each stem once"),
        ({"steps_per_beat": 0}, "1 or more"),
        ({"octaves": 10}, "within MIDI's pitches"),
        ({"n_mels": 64}, "n_mels"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        PianoRoll.from_config(dataclasses.asdict(ROLL) | change)
