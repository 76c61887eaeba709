"""Figures for every sample: does the new stem keep time with the music, and is the music still what it was?

They describe and rank candidates. They are no substitute for `launch.evaluate` or for listening.
"""

from typing import Any

import numpy as np

from subtractive_jax.representation.audio import to_mono

ONSET_TOLERANCE_SECONDS = 0.07
SILENT_STEM_DB = -40.0  # of the stem against the context: below this nothing was put in
_HOP_SECONDS = 0.01
_FFT_SECONDS = 0.064
_FRAMES_AT_ONCE = 4096  # bounds the memory for long songs


def spectrogram(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Hann-windowed STFT magnitude of mono `[samples]`: float32 [frames, bins], a frame each 10 ms, 64 ms windows."""
    hop, n_fft = round(_HOP_SECONDS * sample_rate), round(_FFT_SECONDS * sample_rate)
    audio = np.pad(audio.astype(np.float32), n_fft // 2)
    frames = np.lib.stride_tricks.sliding_window_view(audio, n_fft)[::hop]
    window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
    blocks = range(0, len(frames), _FRAMES_AT_ONCE)
    return np.concatenate([np.abs(np.fft.rfft(frames[i : i + _FRAMES_AT_ONCE] * window)) for i in blocks])


def onsets(spectrum: np.ndarray) -> np.ndarray:
    """Times in seconds at which notes begin, from a `spectrogram`.

    Spectral flux of the compressed magnitude, and the peak picking of Böck et al. 2012 with librosa's settings: the
    largest within the last 30 ms, 7 % of the range above the mean of 100 ms either side, 30 ms apart at least.
    """
    compressed = np.log1p(spectrum)
    flux = np.maximum(np.diff(compressed, axis=0, prepend=compressed[:1]), 0.0).sum(axis=1)
    if flux.max() <= 0.0:
        return np.zeros(0)
    flux = flux / flux.max()
    recent = np.lib.stride_tricks.sliding_window_view(np.pad(flux, (3, 0)), 4).max(axis=1)
    mean = np.lib.stride_tricks.sliding_window_view(np.pad(flux, 10, mode="edge"), 21).mean(axis=1)
    times: list[float] = []
    for frame in np.flatnonzero((flux >= recent) & (flux >= mean + 0.07)):
        time = frame * _HOP_SECONDS
        if not times or time - times[-1] > 0.03:
            times.append(time)
    return np.array(times)


def onset_agreement(
    estimate: np.ndarray, reference: np.ndarray, tolerance: float = ONSET_TOLERANCE_SECONDS
) -> dict[str, float]:
    """Precision, recall and F1 of onset times, each matched at most once within `tolerance` seconds."""
    matched, i, j = 0, 0, 0
    while i < len(estimate) and j < len(reference):  # both ascend, so matching the earliest pair first is optimal
        if abs(estimate[i] - reference[j]) <= tolerance:
            matched, i, j = matched + 1, i + 1, j + 1
        elif estimate[i] < reference[j]:
            i += 1
        else:
            j += 1
    precision = matched / len(estimate) if len(estimate) else 0.0
    recall = matched / len(reference) if len(reference) else 0.0
    f1 = 2.0 * matched / (len(estimate) + len(reference)) if matched else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB of `[samples]` (Le Roux et al. 2019)."""
    target = np.dot(estimate, reference) / (np.dot(reference, reference) + 1e-8) * reference
    return float(10.0 * np.log10((np.sum(target**2) + 1e-8) / (np.sum((target - estimate) ** 2) + 1e-8)))


def log_spectral_distance(estimate: np.ndarray, reference: np.ndarray, where: np.ndarray) -> float:
    """Root mean square difference in dB of two `spectrogram`s over the cells `where`; 0 where there are none."""
    if not where.any():
        return 0.0
    difference = 20.0 * (np.log10(estimate[where] + 1e-5) - np.log10(reference[where] + 1e-5))
    return float(np.sqrt(np.mean(difference**2)))


def level_db(audio: np.ndarray) -> float:
    """Root mean square level in dB relative to full scale; -200 for silence."""
    return float(20.0 * np.log10(np.sqrt(np.mean(np.square(audio, dtype=np.float64))) + 1e-10))


def figures(context: np.ndarray, stem: np.ndarray, mix: np.ndarray, sample_rate: int) -> dict[str, Any]:
    """What `result.json` says about one sample. All audio `[channels, samples]` of the same shape.

    Returns:
      `onsets`: counts in both and how well the stem's agree with the context's (+-70 ms);
      `stem_level_db`: the stem's level against the context's;
      `peak`: of the mix, above 1 would clip in a fixed-point file;
      `preservation`: `exact` when mix - stem is the context in every sample, and `max_error` of that difference; how
      far the mix is from the context: `si_sdr_db`, and `log_spectral_distance_db` where the context is louder than the
      stem;
      `flags`: `silent_stem`, `over_full_scale`.
    """
    spectra = {
        name: spectrogram(to_mono(audio), sample_rate)
        for name, audio in (("context", context), ("stem", stem), ("mix", mix))
    }
    times = {name: onsets(spectra[name]) for name in ("context", "stem")}
    stem_level = level_db(stem) - level_db(context)
    peak = float(np.abs(mix).max())
    undisturbed = (spectra["context"] > spectra["stem"]) & (spectra["context"] > 1e-3 * spectra["context"].max())
    error = float(np.abs(mix - stem - context).max())
    return {
        "onsets": {"stem": len(times["stem"]), "context": len(times["context"])}
        | onset_agreement(times["stem"], times["context"]),
        "stem_level_db": stem_level,
        "peak": peak,
        "preservation": {
            "exact": error == 0.0,
            "max_error": error,
            "si_sdr_db": si_sdr(to_mono(mix), to_mono(context)),
            "log_spectral_distance_db": log_spectral_distance(spectra["mix"], spectra["context"], undisturbed),
        },
        "flags": ["silent_stem"] * (stem_level < SILENT_STEM_DB) + ["over_full_scale"] * (peak > 1.0),
    }


def score(figures: dict[str, Any]) -> float:
    """What candidates are ranked by, larger is better: agreement of onsets, and a silent stem below any other."""
    return figures["onsets"]["f1"] - ("silent_stem" in figures["flags"])
