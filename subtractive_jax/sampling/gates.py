"""Figures for every sample: does the new stem keep time with the music, and is the music still what it was?

They describe and rank candidates, and tell which to draw again. They are no substitute for `launch.evaluate` or for
listening.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from subtractive_jax.sampling import rhythm
from subtractive_jax.sampling.insertion import Levels

SILENT_CONTEXT_DB = -70.0  # relative to full scale: below this there is no music to play along with
SILENT_STEM_DB = -40.0  # of the stem against the context: below this nothing was put in
UNCHANGED_DB = 1.0  # of a mix against its context, both decoded: below this nothing was put in either
_ROUNDING = 1.001  # of the peak of a stem that was turned down to just fit
_FRAMES_AT_ONCE = 4096  # bounds the memory for long songs


def spectra(signals: list[np.ndarray], sample_rate: int) -> Iterator[list[np.ndarray]]:
    """STFT magnitudes of mono signals [samples] of one length, some frames of all at a time: float32 [frames, bins].

    Hann windows of 64 ms every 10 ms.
    """
    hop, n_fft = round(0.01 * sample_rate), round(0.064 * sample_rate)
    window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
    padded = [np.pad(signal.astype(np.float32), n_fft // 2) for signal in signals]
    frames = [np.lib.stride_tricks.sliding_window_view(signal, n_fft)[::hop] for signal in padded]
    for start in range(0, len(frames[0]), _FRAMES_AT_ONCE):
        yield [np.abs(np.fft.rfft(of_one[start : start + _FRAMES_AT_ONCE] * window)) for of_one in frames]


def spectrogram(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """The whole of one signal's `spectra`, float32 [frames, bins]."""
    return np.concatenate([block for (block,) in spectra([audio], sample_rate)])


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB of `[samples]` (Le Roux et al. 2019)."""
    target = np.dot(estimate, reference) / (np.dot(reference, reference) + 1e-8) * reference
    return float(10.0 * np.log10((np.sum(target**2) + 1e-8) / (np.sum((target - estimate) ** 2) + 1e-8)))


def log_spectral_distance(context: np.ndarray, stem: np.ndarray, mix: np.ndarray, sample_rate: int) -> float:
    """Root mean square difference in dB of mix and context where the context is louder than the stem; 0 if nowhere."""
    signals = [context, stem, mix]
    loudest = max((float(block[0].max()) for block in spectra(signals, sample_rate)), default=0.0)
    squares, count = 0.0, 0
    for of_context, of_stem, of_mix in spectra(signals, sample_rate):
        where = (of_context > of_stem) & (of_context > 1e-3 * loudest)
        difference = 20.0 * (np.log10(of_mix[where] + 1e-5) - np.log10(of_context[where] + 1e-5))
        squares, count = squares + float(np.sum(np.square(difference, dtype=np.float64))), count + int(where.sum())
    return float(np.sqrt(squares / count)) if count else 0.0


def level_db(audio: np.ndarray) -> float:
    """Root mean square level in dB relative to full scale; -200 for silence."""
    return float(20.0 * np.log10(np.sqrt(np.mean(np.square(audio, dtype=np.float64))) + 1e-10))


def figures(
    context: np.ndarray, stem: np.ndarray, mix: np.ndarray, sample_rate: int, levels: Levels, change_db: float | None
) -> dict[str, Any]:
    """What `result.json` says about one sample, from mono signals [samples] of one length.

    Args:
      levels: of the whole insertion.
      change_db: how far a generated mix is from its context, both decoded; None for a generated stem.

    Returns:
      `onsets`: counts in both and how well the stem's agree with the context's (+-70 ms); `beats`: F1 of both beats;
      `stem_level_db`: the stem's level against the context's;
      `true_peak`: of the mix, above 1 would clip in a fixed-point file;
      `preservation`: `exact` when mix - stem is the context in every sample, and `max_error` of that difference; how
      far the mix is from the context: `si_sdr_db`, and `log_spectral_distance_db` where the context is louder than the
      stem; `change_db`;
      `flags`: `silent_context`, `silent_stem`, `unchanged`, and `over_full_scale` where the mix is above full scale
      and above what the song itself reaches.
    """
    of_stem, of_context = (rhythm.onset_strength(signal, sample_rate) for signal in (stem, context))
    stem_onsets, context_onsets = rhythm.onsets(of_stem), rhythm.onsets(of_context)
    stem_level = level_db(stem) - level_db(context)
    raised = {
        "silent_context": level_db(context) < SILENT_CONTEXT_DB,
        "silent_stem": stem_level < SILENT_STEM_DB or level_db(stem) < -100.0,
        "unchanged": change_db is not None and change_db < UNCHANGED_DB,
        "over_full_scale": levels.true_peak > _ROUNDING * levels.limit,
    }
    return {
        "onsets": {"stem": len(stem_onsets), "context": len(context_onsets)}
        | rhythm.onset_agreement(stem_onsets, context_onsets),
        "beats": rhythm.beat_agreement(rhythm.beats(of_stem), rhythm.beats(of_context)),
        "stem_level_db": stem_level,
        "true_peak": levels.true_peak,
        "preservation": {
            "exact": levels.max_error == 0.0,
            "max_error": levels.max_error,
            "si_sdr_db": si_sdr(mix, context),
            "log_spectral_distance_db": log_spectral_distance(context, stem, mix, sample_rate),
            "change_db": change_db,
        },
        "flags": [flag for flag, is_raised in raised.items() if is_raised],
    }


def is_bad(figures: dict[str, Any]) -> bool:
    """Whether a sample should be drawn again: nothing was put in, or it would clip. Silent music is no stem's fault."""
    return not {"silent_context"}.issuperset(figures["flags"])


def score(figures: dict[str, Any]) -> float:
    """What candidates are ranked by, larger is better: agreement of onsets and beats; flagged ones below all others."""
    return (figures["onsets"]["f1"] + figures["beats"]) / 2.0 - len(figures["flags"])
