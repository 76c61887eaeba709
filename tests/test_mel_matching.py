"""Audio brought to a mel image."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import auffusion, tiny
from subtractive_jax.representation.mel import Mel
from subtractive_jax.vocoder import mel_matching

MEL = dataclasses.replace(Mel.from_config(tiny.get_config().representation), window_frames=200)
AUFFUSION = Mel.from_config(auffusion.get_config().representation)


def _music(mel: Mel) -> np.ndarray:
    """A chord under four hits of noise a second, 200 frames."""
    seconds = np.arange(mel.samples(200)) / mel.sample_rate
    chord = sum(np.sin(2 * np.pi * pitch * seconds) for pitch in (131.0, 165.0, 196.0, 523.0))
    noise = np.random.default_rng(1).standard_normal(len(seconds))
    return (0.1 * chord + 0.2 * noise * np.exp(-20 * (seconds % 0.25))).astype(np.float32)


def _difference(mel: Mel, audio: np.ndarray, image: np.ndarray) -> float:
    """Nats between the audio's mel image and the one given, mean."""
    return float(np.abs(mel.log_magnitude(mel.encode(audio)) - mel.log_magnitude(image)).mean())


@pytest.mark.parametrize("mel", [MEL, AUFFUSION], ids=["tiny", "auffusion"])
def test_every_turn_brings_the_image_nearer(mel):
    music = _music(mel)
    image = mel.encode(music)
    draw = np.random.default_rng(0)
    off = music * (1.0 + 0.5 * np.sin(np.arange(len(music)) / 700.0)) + 0.01 * draw.standard_normal(len(music))
    turns = [_difference(mel, mel_matching.match_mel(mel, off, image, count), image) for count in (0, 1, 2, 4, 8)]
    assert turns == sorted(turns, reverse=True)
    assert turns[-1] < turns[0] / 3


def test_audio_that_has_the_image_stays():
    music = _music(MEL)
    matched = mel_matching.match_mel(MEL, music, MEL.encode(music), 8)
    np.testing.assert_allclose(matched, music, atol=1e-4)


def test_silence_is_reached_from_noise_and_noise_not_made_from_silence():
    silence = np.zeros(MEL.samples(200), np.float32)
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(silence)).astype(np.float32)
    assert np.abs(mel_matching.match_mel(MEL, noise, MEL.encode(silence), 8)).max() < 1e-3
    assert np.array_equal(mel_matching.match_mel(MEL, silence, MEL.encode(noise), 8), silence)


def test_windows_are_matched_as_they_are_alone():
    music = np.stack([_music(MEL), _music(MEL)[::-1]])
    images = MEL.encode(np.roll(music, 50, axis=1))
    together = mel_matching.match_mel(MEL, music, images, 3)
    for audio, image, found in zip(music, images, together, strict=True):
        np.testing.assert_allclose(mel_matching.match_mel(MEL, audio, image, 3), found, atol=1e-5)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_what_is_out_of_reach_changes_nothing(iterations):
    music, reach = _music(MEL), mel_matching.reach(MEL, iterations)
    image = np.array(MEL.encode(np.roll(music, 50)))
    match = jax.jit(lambda image: mel_matching.match_mel(MEL, music, image, iterations))
    far, near = image.copy(), image.copy()
    far[:, 100 + reach + 1 :] = 0.5
    near[:, 101:] = 0.5
    at = slice(100 * MEL.hop_length, 101 * MEL.hop_length)
    np.testing.assert_allclose(match(far)[at], match(image)[at], atol=1e-6)
    assert (np.abs(match(near)[at] - match(image)[at]).max() > 1e-3) == (iterations > 0)
