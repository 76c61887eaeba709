"""A small classifier of drum patterns by genre: features from audio, linear discriminant analysis, nothing random."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.ndimage
import scipy.signal

from subtractive_jax.sampling.gates import level_db
from subtractive_jax.sampling.rhythm import FRAME_RATE, beats, onset_strength, onsets

_BANDS_HZ = ((30.0, 150.0), (150.0, 2_500.0), (2_500.0, 7_900.0))  # kick, snare and toms, cymbals
_SIXTEENTHS = 8  # of two beats: on the one that has more kick, off the other
_SHRINKAGE = 0.3  # of the covariance, towards the identity: there are few songs of a genre
_LOWEST_DB = -60.0
_LEVEL_DB = -20.0  # RMS at which signals are heard, since onset strengths depend on it


def features(stem: np.ndarray, mix: np.ndarray, sample_rate: int) -> np.ndarray:
    """What the drums play, from mono `[samples]` of 16 kHz at least: float64 `[30]`.

    For each of three bands, the onset strength at the eight sixteenths of two beats (its share, 0 where `mix` has no
    beat), onsets a second as log(1 + n), and the level in dB against the whole stem's. The level of either signal does
    not matter.
    """
    stem, mix = _levelled(stem), _levelled(mix)
    grid = _sixteenths(beats(onset_strength(mix, sample_rate)))
    seconds, level = len(stem) / sample_rate, level_db(stem)
    profiles, densities, levels = [], [], []
    for band in _BANDS_HZ:
        sections = scipy.signal.butter(4, band, "bandpass", fs=sample_rate, output="sos")
        heard = scipy.signal.sosfiltfilt(sections, stem)
        strength = onset_strength(heard, sample_rate)
        densities.append(np.log1p(len(onsets(strength)) / seconds))
        levels.append(max(level_db(heard) - level, _LOWEST_DB))
        profiles.append(_profile(strength, grid))
    kick = profiles[0]
    if kick[_SIXTEENTHS // 2] > kick[0]:
        profiles = [np.roll(profile, _SIXTEENTHS // 2) for profile in profiles]
    return np.concatenate([*profiles, densities, levels])


def _levelled(audio: np.ndarray) -> np.ndarray:
    rms = np.sqrt(np.mean(np.square(audio, dtype=np.float64)))
    return (audio * (10.0 ** (_LEVEL_DB / 20.0) / rms)).astype(np.float32) if rms else audio


def _sixteenths(beat_times: np.ndarray) -> np.ndarray:
    """Times in seconds of the sixteenths from the first beat to the last; of none where there are less than three."""
    if len(beat_times) < 3:
        return np.zeros(0)
    return np.interp(np.arange(4 * (len(beat_times) - 1)) / 4.0, np.arange(len(beat_times)), beat_times)


def _profile(strength: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Shares of the onset strength within 20 ms of the grid, by the place in two beats: `[8]`."""
    sums = np.zeros(_SIXTEENTHS)
    near = scipy.ndimage.maximum_filter1d(strength, 5)
    for index, time in enumerate(grid):
        sums[index % _SIXTEENTHS] += near[min(round(time * FRAME_RATE), len(near) - 1)]
    return sums / sums.sum() if sums.any() else sums


@dataclasses.dataclass(frozen=True)
class GenreClassifier:
    """Linear discriminant analysis with equal priors: a genre that is common in the songs is not preferred."""

    genres: tuple[str, ...]
    weights: np.ndarray  # [D, genres]
    bias: np.ndarray  # [genres]

    @classmethod
    def fitted(cls, examples: np.ndarray, genres: Sequence[str]) -> "GenreClassifier":
        """To features `[examples, D]` and the genre of each."""
        names = tuple(sorted(set(genres)))
        labels = np.array([names.index(genre) for genre in genres])
        means = np.stack([examples[labels == index].mean(axis=0) for index in range(len(names))])
        within = examples - means[labels]
        scale = within.std(axis=0) + 1e-6
        covariance = (within / scale).T @ (within / scale) / len(examples)
        shrunk = (1.0 - _SHRINKAGE) * covariance + _SHRINKAGE * np.eye(len(scale))
        weights = np.linalg.solve(shrunk, (means / scale).T) / scale[:, None]
        return cls(names, weights, -0.5 * np.sum(means.T * weights, axis=0))

    def predict(self, examples: np.ndarray) -> list[str]:
        """The genre of each of `[examples, D]`."""
        return [self.genres[index] for index in np.argmax(examples @ self.weights + self.bias, axis=1)]
