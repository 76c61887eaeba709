"""Figures of parts in notes, and parts by rule, on music that can be counted by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subtractive_jax.evaluation import rules
from subtractive_jax.representation import notes as midi
from subtractive_jax.representation.notes import DRUM_KEYS, DRUMS, NOTE
from subtractive_jax.sampling import symbolic

BEAT = 480
KEY = dict(zip(DRUMS, DRUM_KEYS, strict=True))


def part(*notes):
    """(beat, beats, pitch) to `NOTE`."""
    rows = [(round(beat * BEAT), round((beat + beats) * BEAT), pitch, 80) for beat, beats, pitch in notes]
    return np.array(sorted(rows), NOTE)


def score(parts, metre=(4, 4), beats=16):
    content = midi.write(BEAT, parts, {}, [(0, 500_000)], [(0, *metre)], beats * BEAT)
    return midi.read_score(content)


def bars(beats, each=4):
    return np.append(np.arange(0, beats, each), beats) * BEAT


C, A_MINOR = (60, 64, 67), (57, 60, 64)
CHORDS = part(*((0, 2, pitch) for pitch in C), *((2, 2, pitch) for pitch in A_MINOR))
EDGES = symbolic.half_bars(bars(4))


def test_half_bars_of_a_bar_that_is_cut():
    assert symbolic.half_bars(bars(10)).tolist() == [0, 960, 1920, 2880, 3840, 4320, 4800]


def test_chroma_counts_ticks():
    got = symbolic.chroma(part((1, 2, 60), (0, 1, 72), (3.5, 2, 62)), EDGES)
    expected = np.zeros((2, 12))
    expected[0, 0], expected[1, 0], expected[1, 2] = 2 * BEAT, BEAT, BEAT / 2  # nothing past the end counts
    np.testing.assert_array_equal(got, expected)


def test_harmony_of_what_the_context_plays():
    bass = part((0, 2, 36), (2, 1, 45), (3, 1, 43))  # C, then A, then a G that only the first half has
    assert symbolic.in_harmony(bass, CHORDS, EDGES) == pytest.approx(3 / 4)
    assert np.isnan(symbolic.in_harmony(bass, part(), EDGES)) and np.isnan(symbolic.in_harmony(part(), CHORDS, EDGES))
    first = CHORDS[CHORDS["start"] == 0]
    assert symbolic.in_harmony(bass, first, EDGES) == 1.0  # the half that the context plays in
    cosine = symbolic.chroma_agreement(bass, CHORDS, EDGES)
    assert cosine == pytest.approx((1 / np.sqrt(3) + 1 / np.sqrt(6)) / 2)
    assert np.isnan(symbolic.chroma_agreement(part((0, 1, 36)), part((2, 1, 36)), EDGES))


@settings(max_examples=30, deadline=None)
@given(st.integers(-11, 11), st.lists(st.tuples(st.integers(0, 15), st.integers(40, 70)), min_size=1, max_size=12))
def test_transposing_both_parts_changes_no_agreement(semitones, played):
    notes = part(*((beat / 4, 1, pitch) for beat, pitch in played))
    moved, chords = notes.copy(), CHORDS.copy()
    moved["pitch"] += semitones
    chords["pitch"] += semitones
    for agreement in (symbolic.in_harmony, symbolic.chroma_agreement):
        before, after = agreement(notes, CHORDS, EDGES), agreement(moved, chords, EDGES)
        np.testing.assert_allclose(before, after)
        assert np.isnan(before) or 0.0 <= before <= 1.0 + 1e-9
    patterns = [symbolic.pattern(each, bars(4), BEAT, drums=False) for each in (notes, moved)]
    assert patterns[0] == patterns[1]


def test_profile_counts_bars():
    notes = part((0, 1, 40), (0, 1, 47), (1.5, 1, 40), (4.02, 1, 40), (7.95, 1, 40), (9.5, 1, 40))
    got = symbolic.onset_profile(notes, bars(10), BEAT)
    expected = np.zeros((1, 16))
    expected[0, [0, 6]] = 3, 2  # 7.95 is nearest to the third bar's first sixteenth
    np.testing.assert_array_equal(got, expected)
    assert symbolic.onset_profile(part((15.95, 1, 40)), bars(16), BEAT).sum() == 0  # it belongs to what follows


def test_profiles_of_drums_are_apart():
    kick = part((0, 0.1, KEY["kick"]), (2, 0.1, KEY["kick"]))
    snare = part((0, 0.1, KEY["snare"]), (2, 0.1, KEY["snare"]))
    whole = [symbolic.onset_profile(each, bars(4), BEAT) for each in (kick, snare)]
    by_drum = [symbolic.onset_profile(each, bars(4), BEAT, by_drum=True) for each in (kick, snare)]
    assert symbolic.groove_agreement(*whole) == pytest.approx(1.0)
    assert symbolic.groove_agreement(*by_drum) == 0.0
    assert np.isnan(symbolic.groove_agreement(whole[0], 0 * whole[0]))


def test_distances():
    a, b = part((0, 1, 40), (1, 1, 42)), part((0, 2, 45), (1, 2, 47), (2, 2, 45), (3, 2, 47))
    assert symbolic.density_distance(a, b) == symbolic.density_distance(b, a) == 1.0
    assert symbolic.register_distance(a, b) == pytest.approx(5.0)
    assert symbolic.duration_distance(a, b, BEAT) == pytest.approx(1.0)
    for distance in (symbolic.density_distance, symbolic.register_distance):
        assert distance(a, a) == 0.0 and np.isnan(distance(a, part()))
    assert np.isnan(symbolic.duration_distance(part(), a, BEAT))


def test_what_is_a_copy():
    riff = [(0, 1, 40), (1.5, 0.5, 43), (3, 1, 40)]

    def patterns(*notes, drums=False):
        return symbolic.bar_patterns(part(*notes), bars(8), BEAT, drums)

    once, again = patterns(*riff, *((beat + 4, beats, pitch + 7) for beat, beats, pitch in riff))
    assert once == again
    ((short,)) = patterns(*((beat + 0.05, beats / 2, pitch) for beat, beats, pitch in riff))
    assert short == once  # length and feel do not count
    assert patterns(*riff[:2]) != [once] and patterns((0, 1, 40), (1.5, 0.5, 44), (3, 1, 40)) != [once]
    assert patterns((0, 1, 36), drums=True) == patterns((0, 1, 35), drums=True) != patterns((0, 1, 38), drums=True)
    assert symbolic.pattern(part(), bars(8), BEAT, drums=False) == b"" and patterns() == []


def test_triads():
    edges = symbolic.half_bars(bars(12))
    heard = np.concatenate([CHORDS, part((8, 2, 43), (8, 2, 50))])
    found = rules.triads(np.sort(heard, order=["start", "pitch"]), edges).tolist()
    assert found[0] == [0, 4, 7] and found[1] == [9, 0, 4]
    assert found[2] == found[3] == found[1]  # nothing is played: as before
    assert found[4][::2] == [7, 2]  # G and D, no third
    assert rules.triads(part(), EDGES).tolist() == [[0, 4, 7]] * 2
    (minor,) = rules.triads(part((0, 2, 45), (2, 1, 48), (2, 1, 52)), bars(4))  # one note a time
    assert minor.tolist() == [9, 0, 4]


def test_bass_and_guitar_by_rule():
    context = score({"keys": CHORDS}, beats=4)
    bass = rules.bass(context, CHORDS, 4 * BEAT)
    assert bass["pitch"].tolist() == [36, 36, 33, 33] and (bass["start"] / BEAT).tolist() == [0, 1, 2, 3]
    assert (bass["end"] / BEAT).tolist() == [1, 2, 3, 4]
    guitar = rules.guitar(context, CHORDS, 4 * BEAT)
    assert guitar["pitch"].min() >= 52 and guitar["pitch"].max() < 64
    assert symbolic.in_harmony(guitar, CHORDS, EDGES) == symbolic.in_harmony(bass, CHORDS, EDGES) == 1.0
    assert symbolic.chroma_agreement(guitar, CHORDS, EDGES) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("metre", "beats", "kicks", "snares", "hats"),
    [
        ((4, 4), 8, [0, 2, 4, 6], [1, 3, 5, 7], 16),
        ((3, 4), 6, [0, 3], [1, 2, 4, 5], 12),
        ((6, 8), 6, [0, 3], [1.5, 4.5], 12),
        ((2, 2), 8, [0, 4], [2, 6], 16),
        ((4, 4), 5, [0, 2, 4], [1, 3], 10),  # cut after a beat of the second bar
    ],
)
def test_drums_by_rule(metre, beats, kicks, snares, hats):
    notes = rules.drums(score({"bass": part((0, 1, 40))}, metre, beats), beats * BEAT)

    def beats_of(drum):
        return (notes["start"][notes["pitch"] == KEY[drum]] / BEAT).tolist()

    assert beats_of("kick") == kicks and beats_of("snare") == snares
    assert beats_of("closed hat") == [each / 2 for each in range(hats)]
