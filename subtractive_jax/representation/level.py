"""The level rule: one gain a song, from what is there at sampling time, the music without the stem."""

import numpy as np
import pyloudnorm
import scipy.signal

_STEPS = 4  # a gating block of 0.4 s moves by a quarter of itself
_STEP_SECONDS = 0.1
_ABSOLUTE_GATE_LUFS = -70.0
_RELATIVE_GATE_LU = -10.0
_OFFSET_LUFS = -0.691


class LoudnessMeter:
    """Integrated loudness (ITU-R BS.1770-4, mono) of any weighted sum of signals that are heard once, block by block.

    K-weighting is linear, so what is kept of every tenth of a second is the matrix of the weighted signals' products:
    the power of a sum with weights w is then w' G w.

    Args:
      sample_rate: in Hz.
      signals: number of signals, such as the stems of a song.
    """

    def __init__(self, sample_rate: int, signals: int):
        stages = pyloudnorm.Meter(sample_rate)._filters.values()
        self._sections = np.array([[*(stage.passband_gain * stage.b), *stage.a] for stage in stages])
        self._state = np.zeros((len(self._sections), signals, 2))
        self._step = round(_STEP_SECONDS * sample_rate)
        self._rest = np.zeros((signals, 0))
        self._powers: list[np.ndarray] = []  # [steps, signals, signals]

    def add(self, block: np.ndarray) -> None:
        """Hears `[signals, samples]`, the continuation of what was heard before."""
        if not block.shape[1]:
            return
        weighted, self._state = scipy.signal.sosfilt(self._sections, np.float64(block), zi=self._state)
        heard = np.concatenate([self._rest, weighted], axis=1)
        whole = heard.shape[1] // self._step
        steps = heard[:, : whole * self._step].reshape(len(heard), whole, self._step).swapaxes(0, 1)
        self._powers.append(steps @ steps.swapaxes(1, 2) / self._step)
        self._rest = heard[:, whole * self._step :]

    def gain(self, weights: np.ndarray, loudness_lufs: float) -> float:
        """The factor that brings the sum of the signals with `weights` `[signals]` to `loudness_lufs`.

        1.0 when the sum is silent (below BS.1770's absolute gate of -70 LUFS) or under 0.4 s.
        """
        if sum(map(len, self._powers)) < _STEPS:
            return 1.0
        self._powers = [np.concatenate(self._powers)]
        powers = self._powers[0]
        if self._rest.shape[1] * 2 > self._step:  # as pyloudnorm counts blocks; BS.1770 leaves the last one open
            powers = np.concatenate([powers, (self._rest @ self._rest.T / self._step)[None]])
        steps = powers @ weights @ weights
        blocks = np.convolve(steps, np.full(_STEPS, 1.0 / _STEPS), "valid")
        heard = blocks[blocks >= _power(_ABSOLUTE_GATE_LUFS)]
        if not len(heard):
            return 1.0
        gated = heard[heard > heard.mean() * 10.0 ** (_RELATIVE_GATE_LU / 10.0)]
        return float(np.sqrt(_power(loudness_lufs) / gated.mean()))


def _power(lufs: float) -> float:
    return 10.0 ** ((lufs - _OFFSET_LUFS) / 10.0)


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
    meter = LoudnessMeter(sample_rate, 1)
    meter.add(context[None])
    return meter.gain(np.ones(1), loudness_lufs)
