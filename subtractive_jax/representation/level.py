"""The level rule: one gain a song, from what is there at sampling time, the music without the stem."""

import math

import numpy as np
import pyloudnorm

_BLOCK_SECONDS = 0.4  # BS.1770's gating block: nothing shorter has an integrated loudness


def context_gain(context: np.ndarray, sample_rate: int, loudness_lufs: float = -20.0) -> float:
    """The factor that brings the context to `loudness_lufs` (ITU-R BS.1770 integrated loudness).

    Mix and stem take the same factor; no signal is peak-normalised.

    Args:
      context: mono `[samples]` float, the whole song without the stem.
      sample_rate: in Hz.
      loudness_lufs: the level that models are trained at (`config.data.loudness_lufs`).

    Returns:
      The factor; 1.0 when the context is silent (below BS.1770's absolute gate of -70 LUFS) or under 0.4 s.
    """
    if len(context) <= _BLOCK_SECONDS * sample_rate:
        return 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(np.asarray(context, np.float64))
    return float(10.0 ** ((loudness_lufs - loudness) / 20.0)) if math.isfinite(loudness) else 1.0
