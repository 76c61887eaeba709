"""Onsets, beats and what every sample is measured by."""

import librosa
import numpy as np
import pytest

from subtractive_jax.sampling import gates, rhythm
from subtractive_jax.sampling.insertion import Levels

RATE = 16_000
QUIET = Levels(true_peak=0.5, limit=1.0, lowering_db=0.0, max_error=0.0)


def _clicks(times, seconds=8.0):
    audio = np.zeros(int(seconds * RATE), np.float32)
    for time in times:
        start = int(time * RATE)
        click = 0.5 * np.exp(-np.arange(800) / 100) * np.sin(np.arange(800))
        audio[start : start + 800] += click[: len(audio) - start]
    return audio


def test_onsets_are_found_where_they_are():
    times = np.array([0.5, 1.0, 1.25, 2.0, 3.7])
    found = rhythm.onsets(rhythm.onset_strength(_clicks(times), RATE))
    assert len(found) == len(times)
    np.testing.assert_allclose(found, times, atol=0.04)


def test_onset_strength_does_not_depend_on_its_blocks(monkeypatch):
    audio = np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32)
    expected = rhythm.onset_strength(audio, RATE)
    monkeypatch.setattr(rhythm, "_FRAMES_AT_ONCE", 7)
    np.testing.assert_allclose(rhythm.onset_strength(audio, RATE), expected, rtol=1e-5)


@pytest.mark.parametrize("bpm", [60, 75, 90, 120, 128, 140])
def test_beats_of_clicks(bpm):
    times = np.arange(0.3, 19.9, 60 / bpm)
    strength = rhythm.onset_strength(_clicks(times, 20.0), RATE)
    assert rhythm.tempo(strength) == pytest.approx(bpm, rel=0.01)
    assert rhythm.beat_agreement(rhythm.beats(strength), times) > 0.95


@pytest.mark.parametrize("bpm", [110, *(pytest.param(bpm, marks=pytest.mark.slow) for bpm in (84, 132))])
def test_beats_of_music_are_those_of_librosa(bpm):
    """A kick on every beat, a hi-hat on every half, a tone on every fourth, and noise."""
    random, beats = np.random.default_rng(bpm), np.arange(0.2, 19.5, 60 / bpm)
    audio = _clicks(beats, 20.0) + 0.3 * _clicks(beats[:-1] + 30 / bpm, 20.0)
    time = np.arange(len(audio)) / RATE
    for beat in beats[::4]:
        audio += 0.2 * np.exp(-3 * np.maximum(time - beat, 0)) * np.sin(2 * np.pi * 330 * time) * (time > beat)
    audio += 0.005 * random.standard_normal(len(audio)).astype(np.float32)
    found = rhythm.beats(rhythm.onset_strength(audio, RATE))
    _, theirs = librosa.beat.beat_track(y=audio, sr=RATE, units="time")
    assert rhythm.beat_agreement(found, beats) >= rhythm.beat_agreement(theirs, beats) - 0.02
    assert rhythm.beat_agreement(found, beats) > 0.9


@pytest.mark.parametrize(
    "audio",
    [np.zeros(5 * RATE), np.zeros(1), np.zeros(RATE // 5), np.full(5 * RATE, 0.3)],
    ids=["silence", "a sample", "0.2 s", "a constant"],
)
@pytest.mark.filterwarnings("error")
def test_where_nothing_happens_there_is_no_beat(audio):
    strength = rhythm.onset_strength(audio.astype(np.float32), RATE)
    assert len(rhythm.beats(strength)) == 0
    figures = gates.figures(*[audio.astype(np.float32)] * 3, RATE, QUIET, None)
    assert np.isfinite(figures["stem_level_db"])


def test_agreement_by_hand():
    agreement = rhythm.onset_agreement(np.array([1.0, 1.05, 2.0, 4.0]), np.array([1.03, 2.06, 3.0]))
    assert agreement == {"precision": 0.5, "recall": 2 / 3, "f1": 4 / 7}
    assert rhythm.onset_agreement(np.zeros(0), np.array([1.0]))["f1"] == 0.0


def test_beats_of_any_level_agree():
    beats = np.arange(0.3, 9.0, 0.5)
    for level in (beats, beats[:-1] + 0.25, beats[::2], beats[1::2], np.arange(0.3, 8.9, 0.25)):
        assert rhythm.beat_agreement_at_any_level(level, beats) == 1.0
        assert level is beats or rhythm.beat_agreement(level, beats) < 0.7
    assert rhythm.beat_agreement_at_any_level(beats + 0.125, beats) == 0.0
    assert rhythm.beat_agreement_at_any_level(np.zeros(0), beats) == 0.0
    assert rhythm.beat_agreement_at_any_level(beats, np.zeros(0)) == 0.0


def _figures(context, stem, levels=QUIET, change_db=None):
    return gates.figures(context, stem, context + stem, RATE, levels, change_db)


def test_figures_tell_a_stem_in_time_from_one_that_is_not():
    beat = np.arange(0.5, 7.5, 0.5)
    context = _clicks(beat)
    in_time, late, silent = (_figures(context, _clicks(times)) for times in (beat + 0.01, beat + 0.2, []))
    assert in_time["onsets"]["f1"] > 0.95 and late["onsets"]["f1"] < 0.05
    assert in_time["beats"] > 0.95 and late["beats"] < 0.2
    assert in_time["flags"] == late["flags"] == [] and silent["flags"] == ["silent_stem"]
    assert gates.score(in_time) > gates.score(late) > gates.score(silent)
    assert gates.is_bad(silent) and not gates.is_bad(late)
    np.testing.assert_allclose(_figures(context, 2 * context)["stem_level_db"], 6.02, atol=0.01)


def test_what_clips_and_what_was_not_changed_is_flagged():
    context = _clicks(np.arange(0.5, 7.5, 0.5))
    assert _figures(context, context, Levels(1.01, 1.0, 0.0, 0.0))["flags"] == ["over_full_scale"]
    assert _figures(context, context, Levels(1.01, 1.02, 0.0, 0.0))["flags"] == []  # as the song itself does
    assert _figures(context, context, Levels(1.000001, 1.0, 3.0, 0.0))["flags"] == []
    assert _figures(context, context, change_db=0.3)["flags"] == ["unchanged"]
    assert _figures(context, context, change_db=3.0)["flags"] == []


def test_silent_music_is_told_and_draws_nothing_again():
    beat = _clicks(np.arange(0.5, 7.5, 0.5))
    on_silence = _figures(0 * beat, beat)
    assert on_silence["flags"] == ["silent_context"] and not gates.is_bad(on_silence)
    nothing = _figures(0 * beat, 0 * beat)
    assert nothing["flags"] == ["silent_context", "silent_stem"] and gates.is_bad(nothing)


def test_signal_measures_by_hand():
    reference = np.sin(np.arange(RATE) / 5).astype(np.float32)
    noise = np.cos(np.arange(RATE) / 5 * 1.7).astype(np.float32)
    expected = 10 * np.log10(np.sum(reference**2) / np.sum((0.1 * noise) ** 2))
    np.testing.assert_allclose(gates.si_sdr(3 * (reference + 0.1 * noise), reference), expected, atol=0.2)
    distance = gates.log_spectral_distance(reference, 0 * reference, 2 * reference, RATE)
    np.testing.assert_allclose(distance, 6.02, atol=0.01)
    assert gates.log_spectral_distance(0 * reference, 0 * reference, reference, RATE) == 0.0
    np.testing.assert_allclose(gates.level_db(reference), -3.0, atol=0.1)
