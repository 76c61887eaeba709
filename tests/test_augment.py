"""Augmentation: a function of names alone, within its bounds."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline import augment
from data_pipeline.song import Song

RATE = 16_000
WINDOW = ("song", 2.5, 1, 0)  # song_id, start_seconds, copy, seed


def tone(hertz: float, seconds: float = 2.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def dominant_hertz(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * RATE / len(samples)


def test_nothing_varies_at_zero() -> None:
    stems = {"drums": tone(200), "bass": tone(110)}
    varied = augment.vary(stems, augment.variation(stems, *WINDOW, pitch_semitones=0.0, gain_db=0.0), RATE)
    for stem, samples in stems.items():
        np.testing.assert_array_equal(varied[stem], samples)


@pytest.mark.parametrize("semitones", [-2.0, 0.5, 2.0])
def test_pitch_moves_by_the_semitones_and_drums_stay(semitones: float) -> None:
    stems = {"drums": tone(440), "bass": tone(440), "keys": tone(880, seconds=1.2345)}
    varied = augment.vary(stems, augment.Variation(semitones, dict.fromkeys(stems, 0.0)), RATE)
    np.testing.assert_array_equal(varied["drums"], stems["drums"])
    for stem in ("bass", "keys"):
        assert varied[stem].shape == stems[stem].shape
        assert varied[stem].dtype == np.float32
        moved = 12 * np.log2(dominant_hertz(varied[stem]) / dominant_hertz(stems[stem]))
        assert moved == pytest.approx(semitones, abs=0.1)


def test_gain_is_applied_by_stem() -> None:
    stems = {"drums": tone(440), "bass": tone(110)}
    varied = augment.vary(stems, augment.Variation(0.0, {"drums": -6.0, "bass": 3.0}), RATE)
    assert np.abs(varied["drums"]).max() / np.abs(stems["drums"]).max() == pytest.approx(10 ** (-6 / 20), rel=1e-5)
    assert np.abs(varied["bass"]).max() / np.abs(stems["bass"]).max() == pytest.approx(10 ** (3 / 20), rel=1e-5)


def test_variations_fill_their_bounds_and_differ_by_window_copy_and_seed() -> None:
    names = [("song", 0.5 * window, copy, seed) for window in range(50) for copy in range(2) for seed in range(2)]
    drawn = [augment.variation(("drums", "bass"), *name, pitch_semitones=2.0, gain_db=3.0) for name in names]
    semitones = np.array([one.semitones for one in drawn])
    gains = np.array([list(one.gains_db.values()) for one in drawn])
    assert len(set(semitones)) == len(names)
    assert 1.8 < semitones.max() <= 2.0 and -2.0 <= semitones.min() < -1.8
    assert 2.8 < gains.max() <= 3.0 and -3.0 <= gains.min() < -2.8
    assert abs(np.corrcoef(gains.T)[0, 1]) < 0.3  # stems vary on their own


def test_performances_fill_their_bounds_and_differ_by_song_copy_and_seed() -> None:
    names = [(song_id, number, seed) for song_id in map(str, range(50)) for number in (1, 2) for seed in range(2)]
    drawn = [augment.performance(*name, pitch_semitones=2.0, tempo=0.1) for name in names]
    assert {one.semitones for one in drawn} == {-2, -1, 1, 2}
    speeds = np.array([one.speed for one in drawn])
    assert len(set(speeds)) == len(names)
    assert 1.09 < speeds.max() <= 1.1 and 1 / 1.1 <= speeds.min() < 1 / 1.09
    assert abs(np.median(speeds) - 1.0) < 0.02, "as often slower as faster"
    assert augment.performance("a", 1, 0, pitch_semitones=0.0, tempo=0.0) == augment.Performance(1)


def test_a_stem_draws_the_same_whatever_the_others() -> None:
    both = augment.variation(("drums", "bass"), *WINDOW, 2.0, 3.0)
    alone = augment.variation(("bass",), *WINDOW, 2.0, 3.0)
    assert alone.semitones == both.semitones and alone.gains_db["bass"] == both.gains_db["bass"]
    assert augment.variation(("bass",), "song", np.float64(2.5), 1, 0, 2.0, 3.0) == alone


def test_another_process_draws_the_same() -> None:
    code = (
        "from data_pipeline import augment, song\n"
        f"print(augment.variation(('bass', 'drums'), *{WINDOW}, 2.0, 3.0))\n"
        "songs = [song.Song(n, 'g', 'stems', (), {'tempo': 90, 'key': 'C'}) for n in 'abcdefgh']\n"
        "print([augment.partner(songs[0], songs, copy, 7).song_id for copy in range(9)])\n"
        f"print(augment.remix(dict.fromkeys('abcdef', 0), dict.fromkeys('abcdef', 1), *{WINDOW}))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].count(b"\n") == 3


def song(song_id: str, group_id: str = "album", **tags: object) -> Song:
    return Song(song_id, group_id, "stems", (), tags)


@pytest.mark.parametrize(
    "other",
    [
        song("a", tempo=90.0, key="C"),  # itself
        song("b", group_id="another", tempo=90.0, key="C"),
        dataclasses.replace(song("b", tempo=90.0, key="C"), kind="midi"),
        song("b", tempo=91.0, key="C"),
        song("b", tempo=90.0, key="D"),
        song("b", tempo=90.0, key="C", time_signature="3/4"),
        song("b", key="C"),
    ],
)
def test_no_partner(other: Song) -> None:
    assert augment.partner(song("a", tempo=90.0, key="C"), [other], 0, 0) is None


@pytest.mark.parametrize("tags", [{}, {"tempo": 90.0}, {"key": "C"}, {"tempo": 90.0, "key": None}])
def test_no_partner_for_a_song_of_unknown_tempo_or_key(tags: dict[str, object]) -> None:
    assert augment.partner(song("a", **tags), [song("b", **tags)], 0, 0) is None


def test_partners_differ_by_copy_and_not_by_order() -> None:
    songs = [song(name, tempo=90.0, key="C") for name in "abcd"]
    chosen = [augment.partner(songs[0], songs, copy, 0) for copy in range(20)]
    assert {one.song_id for one in chosen if one} == {"b", "c", "d"}
    assert [augment.partner(songs[0], songs[::-1], copy, 0) for copy in range(20)] == chosen


def test_remix_never_takes_all_from_one() -> None:
    stems = {"vocals": np.zeros(4), "drums": np.zeros(4), "bass": np.zeros(4), "keys": np.zeros(4)}
    partner_stems = {"drums": np.ones(4), "bass": np.ones(4), "keys": np.ones(4), "guitar": np.ones(4)}
    combinations = set()
    for start in range(60):
        mixed = augment.remix(stems, partner_stems, "song", float(start), 0, 0)
        assert list(mixed) == list(stems)
        assert not mixed["vocals"].any()
        combinations.add(tuple(bool(mixed[stem].any()) for stem in ("drums", "bass", "keys")))
    assert len(combinations) == 6  # of eight: not none, not all


@pytest.mark.parametrize(
    "partner_stems, partner_samples, possible",
    [
        (("drums", "bass"), 10 * RATE, True),
        (("drums", "bass", "keys"), 10 * RATE - 800, True),
        (("drums", "bass"), 10 * RATE + 801, False),
        (("drums", "keys"), 10 * RATE, False),
    ],
)
def test_remixable(partner_stems: tuple[str, ...], partner_samples: int, possible: bool) -> None:
    assert augment.remixable(("drums", "bass"), 10 * RATE, partner_stems, partner_samples, RATE) is possible
