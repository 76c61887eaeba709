"""Figures of candidate recordings against a reference set, as rows of one table."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from subtractive_jax.evaluation import distances
from subtractive_jax.evaluation.distances import Estimate
from subtractive_jax.evaluation.embedders import Embedder, Embedding

METRICS = {  # column: heading
    "fd": "FD",
    "fad": "FAD",
    "kl_softmax": "KL softmax",
    "kl_sigmoid": "KL sigmoid",
    "onset_f1": "onset F1",
}
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
    """FD over files, FAD over all patches and, where both sides have the same names, KL; as audioldm_eval defines them.

    FD takes one embedding a file, the mean of its patches; KL is of (reference || candidate).

    Raises:
      UserError: fewer than two recordings on a side.
    """
    paired = reference.keys() == candidate.keys()
    xs = [reference[key] for key in sorted(reference)]
    ys = [candidate[key] for key in sorted(candidate)]
    x_means = np.stack([x.patches.mean(axis=0) for x in xs])
    y_means = np.stack([y.patches.mean(axis=0) for y in ys])

    def patches(embeddings: Sequence[Embedding], indices: np.ndarray) -> np.ndarray:
        return np.concatenate([embeddings[index].patches for index in indices])

    def fd(i: np.ndarray, j: np.ndarray | None = None) -> float:
        return distances.frechet(x_means[i], y_means[i if j is None else j])

    def fad(i: np.ndarray, j: np.ndarray | None = None) -> float:
        return distances.frechet(patches(xs, i), patches(ys, i if j is None else j))

    counts = [len(xs)] if paired else [len(xs), len(ys)]
    figures = {metric: distances.bootstrap(f, counts, replicates) for metric, f in (("fd", fd), ("fad", fad))}
    if not paired:
        return Row(name, len(ys), figures, "file names differ from the reference's: no KL")
    x_logits, y_logits = np.stack([x.logits for x in xs]), np.stack([y.logits for y in ys])
    for metric, divergence in (("kl_softmax", distances.kl_softmax), ("kl_sigmoid", distances.kl_sigmoid)):
        figures[metric] = mean(divergence(x_logits, y_logits))
    return Row(name, len(ys), figures)


def mean(values: np.ndarray) -> Estimate:
    """The mean of `[files]` with its bootstrap interval."""
    return distances.bootstrap(lambda indices: float(values[indices].mean()), [len(values)], replicates=1000)


def to_text(rows: Sequence[Row]) -> str:
    """The table for a terminal, values with their 95 % intervals."""
    lines = [["", "N", *METRICS.values()]]
    for row in rows:
        cells = []
        for metric in METRICS:
            estimate = row.figures.get(metric)
            cells.append(f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]" if estimate else "-")
        lines.append([row.name, str(row.count), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join(aligned + [f"{row.name}: {row.note}" for row in rows if row.note])


def to_csv(rows: Sequence[Row]) -> str:
    """The table as CSV: three columns a metric."""
    ends = ("value", "low", "high")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "count", *(f"{metric}_{end}" for metric in METRICS for end in ends), "note"])
    for row in rows:
        cells = [
            getattr(row.figures[metric], end) if metric in row.figures else "" for metric in METRICS for end in ends
        ]
        writer.writerow([row.name, row.count, *cells, row.note])
    return text.getvalue()
