"""When notes begin and where the beat is, from audio alone: numpy, and bounded memory for songs of any length."""

import numpy as np
import scipy.signal

FRAME_RATE = 100  # frames a second
TOLERANCE_SECONDS = 0.07  # within which two onsets or beats are the same; mir_eval's
_WINDOW_SECONDS = 0.064
_FRAMES_AT_ONCE = 4096
_TEMPO_BPM = 120.0  # where beats are expected, before the music is heard
_TEMPO_OCTAVES = 1.0  # standard deviation of that expectation
_SLOWEST_BPM, _FASTEST_BPM = 40.0, 240.0
_TIGHTNESS = 100.0  # how dearly a beat pays for being early or late, as in librosa
_SHORTEST_SECONDS = 2.0  # of music that can have a tempo


def onset_strength(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Spectral flux of the compressed STFT magnitude of mono `[samples]`: float32 `[frames]`, 100 frames a second."""
    hop, n_fft = round(sample_rate / FRAME_RATE), round(_WINDOW_SECONDS * sample_rate)
    padded = np.pad(audio.astype(np.float32), n_fft // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
    flux, before = [], None
    for start in range(0, len(frames), _FRAMES_AT_ONCE):
        compressed = np.log1p(np.abs(np.fft.rfft(frames[start : start + _FRAMES_AT_ONCE] * window)))
        first = compressed[:1] if before is None else before
        flux.append(np.maximum(np.diff(compressed, axis=0, prepend=first), 0.0).sum(axis=1))
        before = compressed[-1:]
    return np.concatenate(flux).astype(np.float32)


def onsets(strength: np.ndarray) -> np.ndarray:
    """Times in seconds at which notes begin, from an `onset_strength`.

    The peak picking of Böck et al. 2012 with librosa's settings: the largest within the last 30 ms, 7 % of the range
    above the mean of 100 ms either side, 30 ms apart at least.
    """
    if not len(strength) or strength.max() <= 0.0:
        return np.zeros(0)
    strength = strength / strength.max()
    recent = np.lib.stride_tricks.sliding_window_view(np.pad(strength, (3, 0)), 4).max(axis=1)
    mean = np.lib.stride_tricks.sliding_window_view(np.pad(strength, 10, mode="edge"), 21).mean(axis=1)
    times: list[float] = []
    for frame in np.flatnonzero((strength >= recent) & (strength >= mean + 0.07)):
        time = frame / FRAME_RATE
        if not times or time - times[-1] > 0.03:
            times.append(time)
    return np.array(times)


def tempo(strength: np.ndarray) -> float:
    """Beats a minute: the autocorrelation's largest, weighed by how common a tempo is (Ellis 2007); 0 where none is."""
    if len(strength) < _SHORTEST_SECONDS * FRAME_RATE or np.ptp(strength) <= 1e-6 * max(1.0, np.abs(strength).max()):
        return 0.0
    centred = strength - strength.mean()
    correlation = scipy.signal.correlate(centred, centred, method="fft")[len(centred) - 1 :]
    slowest = min(round(60.0 * FRAME_RATE / _SLOWEST_BPM), len(correlation) - 1)
    lags = np.arange(round(60.0 * FRAME_RATE / _FASTEST_BPM), slowest + 1)
    octaves = np.log2(60.0 * FRAME_RATE / lags / _TEMPO_BPM)
    weighed = correlation[lags] * np.exp(-0.5 * np.square(octaves / _TEMPO_OCTAVES))
    best = int(np.argmax(weighed))
    if weighed[best] <= 0.0:
        return 0.0
    shift = 0.0
    if 0 < best < len(lags) - 1:  # between lags, as the parabola through three of them has it
        left, middle, right = correlation[lags[best] - 1 : lags[best] + 2]
        curvature = left - 2.0 * middle + right
        shift = float(np.clip(0.5 * (left - right) / curvature, -0.5, 0.5)) if curvature < 0.0 else 0.0
    return float(60.0 * FRAME_RATE / (lags[best] + shift))


def beats(strength: np.ndarray) -> np.ndarray:
    """Times of beats in seconds, from an `onset_strength`: Ellis 2007, "Beat Tracking by Dynamic Programming".

    None where there is no tempo: in silence, in a steady tone, in under two seconds.
    """
    bpm = tempo(strength)
    if not bpm:
        return np.zeros(0)
    period = 60.0 * FRAME_RATE / bpm
    width = np.arange(-round(period), round(period) + 1)
    smooth = np.convolve(strength / strength.std(), np.exp(-0.5 * np.square(width * 32.0 / period)), "same")
    back = np.arange(-round(2 * period), -round(period / 2) + 1)
    penalty = -_TIGHTNESS * np.square(np.log(-back / period))
    score, previous = smooth.astype(np.float64), np.full(len(smooth), -1)
    first = True
    for frame in range(len(smooth)):
        reach = back[back + frame >= 0]
        if not len(reach):
            continue
        candidates = score[frame + reach] + penalty[-len(reach) :]
        best = int(np.argmax(candidates))
        if first and smooth[frame] < 0.01 * smooth.max():  # nothing has been heard yet
            continue
        first = False
        score[frame] += candidates[best]
        previous[frame] = frame + reach[best]
    peaks = scipy.signal.argrelmax(score)[0]
    if not len(peaks):
        return np.zeros(0)
    last = int(peaks[score[peaks] >= 0.5 * np.median(score[peaks])][-1])
    chain = []
    while last >= 0:
        chain.append(last)
        last = int(previous[last])
    found = np.array(chain[::-1])
    heard = smooth[found] >= 0.5 * np.sqrt(np.mean(np.square(smooth[found])))  # not before or after the music
    inside = np.flatnonzero(heard)
    return found[inside[0] : inside[-1] + 1] / FRAME_RATE if len(inside) else np.zeros(0)


def onset_agreement(
    estimate: np.ndarray, reference: np.ndarray, tolerance: float = TOLERANCE_SECONDS
) -> dict[str, float]:
    """Precision, recall and F1 of ascending times, each matched at most once within `tolerance` seconds."""
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


def beat_agreement(estimate: np.ndarray, reference: np.ndarray) -> float:
    """F1 of beats within 70 ms, mir_eval's F-measure without its cut of the first five seconds."""
    return onset_agreement(estimate, reference)["f1"]


def beat_agreement_at_any_level(estimate: np.ndarray, reference: np.ndarray) -> float:
    """The best `beat_agreement` of the reference's metrical levels: itself, its off-beats, twice and half its tempo.

    The levels are mir_eval's (Davies et al. 2009). In ten seconds of music a tracker often counts another level.
    """
    between = (reference[:-1] + reference[1:]) / 2.0
    doubled = np.sort(np.concatenate([reference, between]))
    levels = (reference, between, doubled, reference[::2], reference[1::2])
    return max(beat_agreement(estimate, level) for level in levels)
