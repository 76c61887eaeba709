"""A map of a collection: a point a window, in a page that opens offline."""

import dataclasses
import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np

_TEMPLATE = Path(__file__).with_name("scatter.html")
# Okabe and Ito's colours, which differ for colour-blind eyes too; the last stands for everything else.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#000000", "#9a9a9a")
_OTHER = "other"
_SIZE, _MARGIN = 1000, 20  # of the drawing


@dataclasses.dataclass(frozen=True)
class Point:
    """One window: its group, which gives the colour, and what is told about it."""

    group: str
    about: str


def write(path: Path, title: str, positions: np.ndarray, points: Sequence[Point], note: str) -> None:
    """Writes the page.

    Args:
      positions: `[points, 2]`; both axes keep one scale.
      note: how the positions came about.
    """
    groups = _groups([point.group for point in points])
    low, extent = positions.min(axis=0), np.ptp(positions, axis=0).max() or 1.0
    places = _MARGIN + (positions - low) / extent * (_SIZE - 2 * _MARGIN)
    circles: dict[str, list[str]] = {group: [] for group in groups}
    for (x, y), point in zip(places, points, strict=True):
        group = point.group if point.group in circles else _OTHER
        about = html.escape(point.about)
        circles[group].append(f'<circle cx="{x:.1f}" cy="{_SIZE - y:.1f}" r="6"><title>{about}</title></circle>')
    layers = (
        f'<g id="group{index}" fill="{groups[group]}">{"".join(circles[group])}</g>'
        for index, group in enumerate(circles)
    )
    legend = (
        f'<label><input type="checkbox" checked data-group="group{index}">'
        f'<span style="background:{groups[group]}"></span>{html.escape(group)} ({len(circles[group])})</label>'
        for index, group in enumerate(circles)
    )
    path.write_text(
        Template(_TEMPLATE.read_text()).substitute(
            title=html.escape(title),
            note=html.escape(note),
            size=_SIZE,
            height=round(float(np.ptp(places[:, 1]))) + 2 * _MARGIN,
            top=_SIZE - round(float(places[:, 1].max())) - _MARGIN,
            layers="".join(layers),
            legend="".join(legend),
        )
    )


def _groups(names: Sequence[str]) -> dict[str, str]:
    """Colours of the commonest groups, and of all others together if there are more than colours."""
    common = [name for name, _ in Counter(names).most_common()]
    if len(common) > len(_COLORS):
        common = [*common[: len(_COLORS) - 1], _OTHER]
    return dict(zip(common, _COLORS if len(common) == len(_COLORS) else _COLORS[:-1], strict=False))
