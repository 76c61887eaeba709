"""Whether a stem belongs to its music: harmony, and the mixes that prompt adherence is measured on."""

import numpy as np

from subtractive_jax.representation.level import context_gain
from subtractive_jax.representation.stft import hann

_WINDOW_SECONDS = 0.256
_HOP_SECONDS = 0.064
_LOWEST_HZ, _HIGHEST_HZ = 55.0, 5_000.0  # below, bins are wider than semitones; above, there is little but noise
_WIDTH_SEMITONES = 0.5  # standard deviation of the pitches a bin counts for
_SILENT_DB = -60.0  # against the loudest frame
_LOUDNESS_LUFS = -20.0


def chroma(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power of the twelve pitch classes, C first (A4 is 440 Hz), of mono `[samples]`: float64 `[frames, 12]`.

    Hann windows of 256 ms every 64 ms, centred; bins of 55 to 5,000 Hz.
    """
    n_fft, hop = round(_WINDOW_SECONDS * sample_rate), round(_HOP_SECONDS * sample_rate)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio, n_fft // 2), n_fft)[::hop]
    frequencies = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    heard = np.flatnonzero((frequencies >= _LOWEST_HZ) & (frequencies <= _HIGHEST_HZ))
    semitones = 69.0 + 12.0 * np.log2(frequencies[heard] / 440.0)
    apart = (semitones[:, None] - np.arange(12) + 6.0) % 12.0 - 6.0
    weights = np.exp(-0.5 * np.square(apart / _WIDTH_SEMITONES))
    return np.square(np.abs(np.fft.rfft(frames * hann(n_fft))[:, heard])) @ weights


def chroma_agreement(a: np.ndarray, b: np.ndarray, sample_rate: int) -> float:
    """Mean cosine of the `chroma` of two mono signals `[samples]` over the frames in which both sound.

    audiocraft's chroma cosine. A frame sounds when it has more than -60 dB of its signal's loudest; 0 where none does
    in both. Chroma are positive, so that the cosine of strangers is far above 0: compare with those.
    """
    x, y = (chroma(audio, sample_rate) for audio in (a, b))
    loud = [np.linalg.norm(of_one, axis=1) for of_one in (x, y)]
    both = np.logical_and(*(level > max(10.0 ** (_SILENT_DB / 10.0) * level.max(), 1e-12) for level in loud))
    if not both.any():
        return 0.0
    return float(np.mean(np.sum(x[both] * y[both], axis=1) / (loud[0][both] * loud[1][both])))


def balanced_mix(context: np.ndarray, stem: np.ndarray, sample_rate: int) -> np.ndarray:
    """Context and stem, mono `[samples]`, at equal loudness (ITU-R BS.1770), the sum at -20 LUFS: mono `[samples]`.

    How accompaniment prompt adherence mixes (Grachten and Nistal 2025), so that it says nothing about levels.
    """

    def levelled(audio: np.ndarray) -> np.ndarray:
        return np.float32(context_gain(audio, sample_rate, _LOUDNESS_LUFS)) * audio

    return levelled(levelled(context) + levelled(stem))
