"""Chroma against librosa's, its agreement, and the mixes of prompt adherence."""

import librosa
import numpy as np
import pytest

from subtractive_jax.evaluation.alignment import balanced_mix, chroma, chroma_agreement
from subtractive_jax.representation.level import context_gain

RATE = 16_000


def chord(*pitches, seconds=2.0, sample_rate=RATE):
    """Sawtooth-like tones of MIDI pitches: six harmonics each."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    tones = [
        np.sin(2 * np.pi * 440.0 * 2 ** ((pitch - 69) / 12) * harmonic * time) / harmonic
        for pitch in pitches
        for harmonic in range(1, 7)
    ]
    return (0.1 * np.sum(tones, axis=0)).astype(np.float32)


def progression():
    return np.concatenate([chord(48, 52, 55, 60), chord(53, 57, 60, 65), chord(50, 55, 59, 62), chord(45, 48, 52, 57)])


@pytest.mark.parametrize("sample_rate", [16_000, 44_100])
@pytest.mark.parametrize("pitch", [36, 60, 69, 83])
def test_a_note_is_of_its_pitch_class(pitch, sample_rate):
    assert np.all(np.argmax(chroma(chord(pitch, sample_rate=sample_rate), sample_rate)[2:-2], axis=1) == pitch % 12)


def test_chroma_is_like_librosas():
    music = progression()
    ours = chroma(music, RATE)[2:-2]
    theirs = librosa.feature.chroma_stft(y=music, sr=RATE, n_fft=4096, hop_length=1024, tuning=0.0).T[2:-2]
    ours /= ours.max(axis=1, keepdims=True)
    assert ours.shape == theirs.shape
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9


def test_agreement_is_of_harmony_not_of_timbre_or_level():
    music = progression()
    bass = np.concatenate([chord(36), chord(41), chord(43), chord(33)])
    fits, clashes = chroma_agreement(bass, music, RATE), chroma_agreement(np.roll(bass, len(bass) // 4), music, RATE)
    assert chroma_agreement(music, 0.01 * music, RATE) == pytest.approx(1.0)
    assert fits > clashes + 0.2
    assert chroma_agreement(bass, music, RATE) == pytest.approx(chroma_agreement(music, bass, RATE))


def test_only_frames_in_which_both_sound_count():
    c_major, silence = chord(48, 52, 55), np.zeros(2 * RATE, np.float32)
    first, both = np.concatenate([c_major, silence]), np.concatenate([c_major, chord(49, 54, 56)])
    assert chroma_agreement(first, both, RATE) > 0.9  # one frame lies across the change
    assert chroma_agreement(first, np.zeros_like(first), RATE) == 0.0


def test_balanced_mix_forgets_levels():
    generator = np.random.default_rng(0)
    context, stem = generator.normal(size=(2, 3 * RATE)).astype(np.float32) * 0.1
    mixed = balanced_mix(context, stem, RATE)
    assert context_gain(mixed, RATE) == pytest.approx(1.0, abs=1e-3)  # -20 LUFS
    np.testing.assert_allclose(balanced_mix(0.3 * context, 0.02 * stem, RATE), mixed, atol=1e-5)
    alone = balanced_mix(context, np.zeros_like(stem), RATE)
    assert np.corrcoef(alone, context)[0, 1] == pytest.approx(1.0)
