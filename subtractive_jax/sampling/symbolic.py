"""Figures of a part in notes: harmony, groove, density, register, durations, copies.

Parts are `NOTE` arrays in ticks of their score. `edges` are ticks between which harmony is compared, `bars` those of
bar lines; the last of either is the end of what is measured, and the last bar may be incomplete. What cannot be had is
NaN.
"""

import numpy as np
import scipy.stats

from subtractive_jax.representation.notes import DRUM_CLASSES, DRUMS

STEPS_PER_BEAT = 4  # of a quarter note: onsets are compared by sixteenths


def half_bars(bars: np.ndarray) -> np.ndarray:
    """Bar lines and the middles between them: `[2 bars + 1]`."""
    return np.sort(np.concatenate([bars, (bars[:-1] + bars[1:]) / 2.0]))


def chroma(notes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Ticks that each pitch class sounds between two edges, C first; notes at once all count: `[spans, 12]`."""
    return np.stack([_sounding(notes[notes["pitch"] % 12 == index], edges) for index in range(12)], axis=1)


def _sounding(notes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Ticks that notes sound between two edges `[spans]`: up to an edge, all that began less all that ended."""

    def up_to(ticks: np.ndarray) -> np.ndarray:
        ticks = np.sort(ticks)
        before = np.searchsorted(ticks, edges)
        return before * edges - np.append(0.0, np.cumsum(ticks, dtype=np.float64))[before]

    return np.maximum(np.diff(up_to(notes["start"]) - up_to(notes["end"])), 0.0)


def in_harmony(part: np.ndarray, context: np.ndarray, edges: np.ndarray) -> float:
    """Share of the part's time in pitch classes that the context plays, at any time, between the same edges.

    Spans in which the context plays no pitch are left out.
    """
    heard = chroma(context, edges) > 0.0
    own = chroma(part, edges) * heard.any(axis=1, keepdims=True)
    return float(own[heard].sum() / own.sum()) if own.any() else np.nan


def chroma_agreement(a: np.ndarray, b: np.ndarray, edges: np.ndarray) -> float:
    """Mean cosine of the `chroma` of two parts, over the spans in which both sound."""
    x, y = chroma(a, edges), chroma(b, edges)
    both = x.any(axis=1) & y.any(axis=1)
    if not both.any():
        return np.nan
    return float(np.mean([_cosine(own, other) for own, other in zip(x[both], y[both], strict=True)]))


def onset_cells(notes: np.ndarray, bars: np.ndarray, ticks_per_beat: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all onsets that are nearest to a place in a bar: the note, the bar, the sixteenth in it."""
    step = ticks_per_beat / STEPS_PER_BEAT
    ahead = notes["start"] + step / 2.0
    bar = np.searchsorted(bars, ahead, side="right") - 1
    note = np.flatnonzero((bar >= 0) & (bar < len(bars) - 1))
    return note, bar[note], ((ahead[note] - bars[bar[note]]) // step).astype(int)


def onset_profile(notes: np.ndarray, bars: np.ndarray, ticks_per_beat: int, by_drum: bool = False) -> np.ndarray:
    """In how many bars there is an onset at each sixteenth: `[1, sixteenths of the longest bar]`.

    Args:
      by_drum: drums, counted by class: `[9, sixteenths]`.
    """
    note, bar, sixteenth = onset_cells(notes, bars, ticks_per_beat)
    row = DRUM_CLASSES[notes["pitch"][note]] if by_drum else np.zeros_like(note)
    longest = int(np.ceil(np.diff(bars).max() * STEPS_PER_BEAT / ticks_per_beat))
    there = np.zeros((len(bars) - 1, len(DRUMS) if by_drum else 1, longest))
    there[bar, row, sixteenth] = 1.0
    return there.sum(axis=0)


def groove_agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two onset profiles of one shape."""
    return _cosine(a.ravel(), b.ravel()) if a.any() and b.any() else np.nan


def density_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|log2| of the ratio of the numbers of notes: 1 where one part has twice as many as the other."""
    return abs(float(np.log2(len(a) / len(b)))) if len(a) and len(b) else np.nan


def register_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein-1 distance of the notes' pitches, in semitones."""
    return float(scipy.stats.wasserstein_distance(a["pitch"], b["pitch"])) if len(a) and len(b) else np.nan


def duration_distance(a: np.ndarray, b: np.ndarray, ticks_per_beat: int) -> float:
    """Wasserstein-1 distance of the notes' durations, in beats (quarter notes)."""
    if not (len(a) and len(b)):
        return np.nan
    return float(scipy.stats.wasserstein_distance(a["end"] - a["start"], b["end"] - b["start"])) / ticks_per_beat


def pattern(notes: np.ndarray, bars: np.ndarray, ticks_per_beat: int, drums: bool) -> bytes:
    """Equal for stretches that are copies of one another: onsets by bar, sixteenth, and pitch above the lowest.

    So durations, velocities and the key do not count; of drums the class counts. Empty where there is no onset.
    """
    note, bar, sixteenth = onset_cells(notes, bars, ticks_per_beat)
    pitch = notes["pitch"][note]
    what = DRUM_CLASSES[pitch] if drums else pitch - pitch.min(initial=127)
    return np.unique(bar << 20 | sixteenth << 8 | what).astype("<u4").tobytes()


def bar_patterns(notes: np.ndarray, bars: np.ndarray, ticks_per_beat: int, drums: bool) -> list[bytes]:
    """The `pattern` of each bar that has an onset."""
    found = (pattern(notes, bars[i : i + 2], ticks_per_beat, drums) for i in range(len(bars) - 1))
    return list(filter(None, found))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
