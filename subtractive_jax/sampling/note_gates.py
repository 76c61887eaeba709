"""Figures for every part that was written in notes: does it fit the harmony and the rhythm of the song?

They describe and rank candidates, and tell which to draw again. They are no substitute for `launch.evaluate` or for
listening.
"""

from typing import Any

import numpy as np

from subtractive_jax.representation.notes import Score
from subtractive_jax.sampling import symbolic


def figures(score: Score, stem: str, notes: np.ndarray, place: tuple[int, int]) -> dict[str, Any]:
    """What `result.json` says about one part.

    Args:
      score: the song without the part.
      notes: of the part, within `place`.
      place: its first and last tick.

    Returns:
      `notes`, and `notes_per_beat`;
      `harmony`: the share of the part's time in pitch classes that the song plays in the same half bar; None for drums,
      and where nothing else has a pitch;
      `groove`: the cosine of how often either begins notes at each sixteenth of the bar; None where one begins none;
      `preservation`: always `exact`, since the song's own tracks are written as they were read;
      `flags`: `empty`.
    """
    first, last = place
    bars = score.bars()
    bars = np.append(bars[(bars >= first) & (bars < last)], last)
    bars = np.insert(bars, 0, first) if bars[0] > first else bars
    others = {name: part[(part["end"] > first) & (part["start"] < last)] for name, part in score.parts.items()}
    pitched = np.concatenate([part for name, part in others.items() if name != "drums"] or [notes[:0]])
    profiles = [
        symbolic.onset_profile(part, bars, score.ticks_per_beat)
        for part in (notes, np.concatenate(list(others.values())))
    ]
    harmony = np.nan if stem == "drums" else symbolic.in_harmony(notes, pitched, symbolic.half_bars(bars))
    return {
        "notes": len(notes),
        "notes_per_beat": len(notes) * score.ticks_per_beat / (last - first),
        "harmony": _or_none(harmony),
        "groove": _or_none(symbolic.groove_agreement(*profiles)),
        "preservation": {"exact": True},
        "flags": [] if len(notes) else ["empty"],
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def score(figures: dict[str, Any]) -> float:
    """What candidates are ranked by, larger is better: the mean of harmony and groove; flagged ones come last."""
    agreements = [value for name in ("harmony", "groove") if (value := figures[name]) is not None]
    return sum(agreements) / max(len(agreements), 1) - len(figures["flags"])
