"""What launch.evaluate --midi_table does: the cases of the paper's MIDI page as tables, and as a page."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from launch import listening
from subtractive_jax import page
from subtractive_jax.evaluation import midi_table, table
from subtractive_jax.evaluation.midi_table import CASES, OTHER, OURS, PAGE, REAL, RULE, Case, Known, Window
from subtractive_jax.evaluation.paper_table import UnavailableError
from subtractive_jax.evaluation.table import Row
from subtractive_jax.model import Model
from subtractive_jax.representation.notes import parts_alone, with_parts

_LABELS = {**listening.LABELS, "original": "With the real stem", "rule": "Stem by rule"}


class Measured(NamedTuple):
    """One case: its windows, the parts for each, and the table."""

    windows: Sequence[Window]
    parts: Mapping[str, Sequence[np.ndarray]]
    rows: Sequence[Row]


def measure(
    model: Model, data_dir: str, split: str, num_windows: int, known: Mapping[str, Known], steps: int | None
) -> dict[Case, Measured]:
    """All cases.

    Args:
      num_windows: of each case.
      known: what the train split holds of each stem.
      steps: of the sampler; the model's own when None.
    """
    found = {
        case: midi_table.read_windows(data_dir, split, case.stem, num_windows, case.given) for case in CASES
    }  # of all, before any is sampled from
    cases = {}
    for case, windows in found.items():
        drawn = midi_table.sampled(model, windows, steps)
        parts = {
            REAL: [window.stem for window in windows],
            RULE: [midi_table.by_rule(window) for window in windows],
            OURS: list(tqdm(drawn, desc=str(case), total=len(windows), leave=False)),
        }
        missing = []
        try:
            parts = {REAL: parts[REAL], OTHER: midi_table.other_parts(windows), **parts}
        except UnavailableError as reason:
            missing = [Row(OTHER, 0, {}, str(reason))]
        cases[case] = Measured(windows, parts, [*midi_table.measure(windows, parts, known[case.stem]), *missing])
    return cases


def to_text(cases: Mapping[Case, Measured]) -> str:
    """A table a case, for a terminal."""
    return "\n\n".join(f"{case}\n\n{table.to_text(own.rows, midi_table.METRICS)}" for case, own in cases.items())


def rows(cases: Mapping[Case, Measured]) -> list[Row]:
    """The rows of all cases."""
    return [dataclasses.replace(row, name=f"{case}: {row.name}") for case, own in cases.items() for row in own.rows]


def write_page(folder: Path, title: str, cases: Mapping[Case, Measured], known: Mapping[str, Known]) -> None:
    """The rows of the paper's page, each with its case's first window; a case's second time with the second."""
    seen = collections.Counter[Case]()
    shown = []
    for number, case in enumerate(PAGE, 1):
        place = folder / f"case_{number}"
        place.mkdir()
        shown.append(_page_row(place, case, cases[case], seen[case], known[case.stem]))
        seen[case] += 1
    page.write(folder, title, shown, kind="Case")


def _page_row(folder: Path, case: Case, measured: Measured, index: int, known: Known) -> page.Row:
    """One window, with its sounds in `folder`, which lies beside the page."""
    window, stem = measured.windows[index], case.stem
    context = window.context
    real, rule, ours = ({stem: measured.parts[name][index]} for name in (REAL, RULE, OURS))
    versions = {
        "original": with_parts(context, real, {}),
        "without_stem": context.content,
        "mix": with_parts(context, ours, {}),
        "stem": parts_alone(context, ours, {}),
        "rule": with_parts(context, rule, {}),
    }
    players = listening.render(folder, versions, _LABELS)
    figures = midi_table.figures(ours[stem], window, known)
    return page.Row(
        f"{folder.name.replace('_', ' ')}: {case}",
        window.instruction,
        [(label, f"{folder.name}/{file}") for label, file in players],
        {"Seed": index, "Group of songs": window.group_id},
        {midi_table.METRICS[metric]: value for metric, value in figures.items() if not np.isnan(value)},
        section="MIDI",
        picture=listening.picture(folder, versions["mix"], {stem}, players),
    )
