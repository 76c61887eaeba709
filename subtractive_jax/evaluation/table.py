"""Figures of candidate recordings against a reference set, as rows of one table."""

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from subtractive_jax.evaluation import distances
from subtractive_jax.evaluation.distances import Estimate
from subtractive_jax.evaluation.embedders import Embedder, Embedding

METRICS = {  # column: heading
    "fd": "FD",
    "fad": "FAD",
    "fad_inf": "FAD-inf",
    "kad": "KAD",
    "kl_softmax": "KL softmax",
    "kl_sigmoid": "KL sigmoid",
    "sub_fad": "sub-FAD",
    "apa": "APA",
    "onset_f1": "onset F1",
    "beat_f1": "beat F1",
    "beat_level_f1": "beat F1, any level",
    "chroma_agreement": "chroma",
    "clap": "CLAP",
    "silent_stem": "silent",
    "no_edit": "no edit",
}
_COLUMNS_A_BLOCK = 6  # in a terminal
Embeddings = Mapping[str, Embedding]  # by file name


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; a figure that cannot be had is missing, and `note` says why."""

    name: str
    count: int
    figures: Mapping[str, Estimate]
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        figures = {metric: dataclasses.asdict(estimate) for metric, estimate in self.figures.items()}
        return {"name": self.name, "count": self.count, **figures, "note": self.note}


def embed_all(embedder: Embedder, recordings: Iterable[tuple[str, np.ndarray, int]]) -> dict[str, Embedding]:
    """Embeds (name, mono `[samples]`, sample rate in Hz)."""
    return {name: embedder.embed(audio, sample_rate) for name, audio, sample_rate in recordings}


def compare(name: str, reference: Embeddings, candidate: Embeddings, replicates: int = 100) -> Row:
    """Distances of files' embeddings as `distances` defines them; FD, FAD and KL are audioldm_eval's.

    FD takes one embedding a file, the mean of its patches; FAD, FAD-inf and KAD take all patches. KL is of
    (reference || candidate), where both sides have the same names and the embedder knows classes.

    Raises:
      UserError: fewer than two recordings on a side.
    """
    paired = reference.keys() == candidate.keys()
    xs = [reference[key] for key in sorted(reference)]
    ys = [candidate[key] for key in sorted(candidate)]
    x_means, y_means = (np.stack([item.patches.mean(axis=0) for item in items]) for items in (xs, ys))

    def fd(i: np.ndarray, j: np.ndarray) -> float:
        return distances.frechet(x_means[i], y_means[j])

    def fad(i: np.ndarray, j: np.ndarray) -> float:
        return distances.frechet(patches(xs, i), patches(ys, j))

    def fad_inf(i: np.ndarray, j: np.ndarray) -> float:
        return distances.frechet_infinity(patches(xs, i), patches(ys, j))

    kad = distances.KernelDistance([x.patches for x in xs], [y.patches for y in ys])
    statistics: dict[str, Callable[..., float]] = {"fd": fd, "fad": fad, "kad": kad}
    notes = []
    if (count := sum(len(y.patches) for y in ys)) >= distances.FEWEST_FOR_INFINITY:
        statistics["fad_inf"] = fad_inf
    else:
        notes.append(f"no FAD-inf, which takes {distances.FEWEST_FOR_INFINITY} patches and has {count}")
    figures = {
        metric: distances.bootstrap(statistic, [len(xs), len(ys)], replicates, paired=paired)
        for metric, statistic in statistics.items()
    }
    x_logits, y_logits = ([item.logits for item in items if item.logits is not None] for items in (xs, ys))
    if not paired:
        notes.append("no KL, since file names differ from the reference's")
    elif not x_logits:
        notes.append("no KL, since the embedder knows no classes")
    else:
        figures["kl_softmax"] = mean(distances.kl_softmax(np.stack(x_logits), np.stack(y_logits)))
        figures["kl_sigmoid"] = mean(distances.kl_sigmoid(np.stack(x_logits), np.stack(y_logits)))
    return Row(name, len(ys), figures, "; ".join(notes))


def patches(embeddings: Sequence[Embedding], indices: np.ndarray) -> np.ndarray:
    """All patches `[patches, D]` of the recordings with these indices."""
    return np.concatenate([embeddings[index].patches for index in indices])


def mean(
    values: np.ndarray,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[str] | None = None,
) -> Estimate:
    """The mean of `[files]` with its percentile bootstrap interval, which for a share stays within 0 and 1.

    Args:
      groups: of each value; those of one group are drawn together, since they are not independent.
    """
    _, of = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    sums, counts = np.bincount(of, values), np.bincount(of)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(replicates, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def to_text(rows: Sequence[Row], metrics: Mapping[str, str] = METRICS) -> str:
    """The table for a terminal, values with their 95 % intervals; columns that no row fills are left out.

    Args:
      metrics: columns and their headings.
    """
    filled = [metric for metric in metrics if any(metric in row.figures for row in rows)]
    blocks = []
    for start in range(0, len(filled), _COLUMNS_A_BLOCK):
        columns = filled[start : start + _COLUMNS_A_BLOCK]
        head = ["", "N", *(metrics[metric] for metric in columns)]
        lines = [[row.name, str(row.count), *(_cell(row, metric) for metric in columns)] for row in rows]
        blocks.append(aligned([head, *lines]))
    named: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            named.setdefault(row.note, []).append(row.name)
    notes = [f"{'all rows' if len(names) == len(rows) else ', '.join(names)}: {note}" for note, names in named.items()]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def _cell(row: Row, metric: str) -> str:
    """The figure, and of how many it is where they are fewer than the row's."""
    estimate = row.figures.get(metric)
    fewer = f" of {estimate.count}" if estimate and estimate.count != row.count else ""
    return with_interval(estimate) + fewer


def with_interval(estimate: Estimate | None) -> str:
    """As people read it: "0.52 [0.48, 0.56]"."""
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]" if estimate else "-"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def to_csv(rows: Sequence[Row], metrics: Mapping[str, str] = METRICS) -> str:
    """The table as CSV: four columns a metric."""
    ends = ("value", "low", "high", "count")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "count", *(f"{metric}_{end}" for metric in metrics for end in ends), "note"])
    for row in rows:
        cells = [
            getattr(row.figures[metric], end) if metric in row.figures else "" for metric in metrics for end in ends
        ]
        writer.writerow([row.name, row.count, *cells, row.note])
    return text.getvalue()
