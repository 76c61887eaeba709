"""Parts by rule, which a model should do better than: root notes, chord tones, and a rock beat, on every beat.

All are for a stretch that begins at tick 0 of a score and ends at `end`.
"""

import numpy as np

from subtractive_jax.representation.notes import DRUM_KEYS, DRUMS, NOTE, Score
from subtractive_jax.sampling.symbolic import chroma, half_bars

_TRIADS = np.array(  # [24, 12]: major on C, C sharp, ..., then minor
    [np.roll(np.eye(12)[[0, third, 7]].sum(axis=0), root) for third in (4, 3) for root in range(12)]
)
_BASS_FROM, _GUITAR_FROM = 28, 52  # E1, E3: the lowest note; all are within an octave above
_VELOCITY = 90
_IN_THE_BASS, _IN_THE_KEY = 0.1, 0.01  # weights that decide between triads that fit the notes about as well


def triads(context: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The triad that fits what the context plays between two edges: pitch classes, the root first, `[spans, 3]`.

    That of the highest cosine with the `chroma` (Fujishima 1999, "Realtime chord recognition of musical sound"); one
    whose root is the lowest pitch class is preferred, and then one in the key. A span without pitch has the triad of
    the one before, or C major.
    """
    weights = chroma(context, edges)
    key = _fits(weights.sum(axis=0))
    chosen, found = 0, []
    for weight, first, last in zip(weights, edges[:-1], edges[1:], strict=True):
        if weight.any():
            sounding = context["pitch"][(context["start"] < last) & (context["end"] > first)]
            is_lowest = np.arange(24) % 12 == sounding.min() % 12
            chosen = int(np.argmax(_fits(weight) + _IN_THE_BASS * is_lowest + _IN_THE_KEY * key))
        root, third = chosen % 12, 4 if chosen < 12 else 3
        found.append([root, (root + third) % 12, (root + 7) % 12])
    return np.array(found)


def _fits(weight: np.ndarray) -> np.ndarray:
    """Cosines of `[12]` with the triads, 0 for nothing: `[24]`."""
    return _TRIADS @ weight / (np.sqrt(3.0) * max(np.linalg.norm(weight), 1e-9))


def bass(score: Score, context: np.ndarray, end: int) -> np.ndarray:
    """The triad's root on each beat, from E1 up."""
    return _chords(score, context, end, tones=1, lowest=_BASS_FROM)


def guitar(score: Score, context: np.ndarray, end: int) -> np.ndarray:
    """The triad on each beat, from E3 up."""
    return _chords(score, context, end, tones=3, lowest=_GUITAR_FROM)


def _chords(score: Score, context: np.ndarray, end: int, tones: int, lowest: int) -> np.ndarray:
    edges = half_bars(np.append(score.bars(end), end))
    beats = score.beats(end)[0]
    harmony = triads(context, edges)[np.searchsorted(edges, beats, side="right") - 1, :tones]
    return _notes(
        np.repeat(beats, tones), np.repeat(np.append(beats[1:], end), tones), (lowest + (harmony - lowest) % 12).ravel()
    )


def drums(score: Score, end: int) -> np.ndarray:
    """A rock beat in the score's metre: kick and snare in turn on the beats, closed hats on every eighth note.

    A bar begins with the kick and ends with the snare: in 3/4 kick, snare, snare.
    """
    beats, is_bar = score.beats(end)
    place = np.arange(len(beats)) - np.flatnonzero(is_bar)[np.cumsum(is_bar) - 1]
    ends_bar = np.append(is_bar[1:], True)
    kick = (place % 2 == 0) & ~(ends_bar & (place > 0))
    lengths = np.diff(np.append(beats, end))
    eighths = np.maximum(np.round(2 * lengths / score.ticks_per_beat).astype(int), 1)
    hats = np.concatenate(
        [beat + np.arange(n) * length // n for beat, length, n in zip(beats, lengths, eighths, strict=True)]
    )
    key = dict(zip(DRUMS, DRUM_KEYS, strict=True))
    starts = np.concatenate([beats, hats])
    keys = np.concatenate([np.where(kick, key["kick"], key["snare"]), np.full(len(hats), key["closed hat"])])
    return _notes(starts, starts + max(score.ticks_per_beat // 4, 1), keys)


def _notes(starts: np.ndarray, ends: np.ndarray, pitches: np.ndarray) -> np.ndarray:
    notes = np.empty(len(starts), NOTE)
    notes["start"], notes["end"], notes["pitch"], notes["velocity"] = starts, ends, pitches, _VELOCITY
    return notes[np.lexsort((notes["pitch"], notes["start"]))]
