"""Draws a map of a collection from exported latents: windows that are alike lie close together.

  python -m launch.latents_map --input=latents.parquet --output=map.html [--method=pca|umap] [--color_by=genre]

--color_by names a tag (genre) or a column (song_id, split, stem). UMAP needs the extra `map`. As a start for your own
analysis, this is all there is to reading the file:

  table = pyarrow.parquet.read_table("latents.parquet")
  embeddings = numpy.array(table["embedding"].to_pylist())
  latents = numpy.array(table["latent"].to_pylist()).reshape(-1, *json.loads(table.schema.metadata[b"latent_shape"]))
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from launch import program
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.page import scatter

_INPUT = flags.DEFINE_string("input", None, "File that launch.export_latents wrote.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "HTML file to write; must not exist.", required=True)
_METHOD = flags.DEFINE_string("method", "pca", "How embeddings become places: pca or umap.")
_COLOR_BY = flags.DEFINE_string("color_by", "genre", "Tag or column that gives the colours.")

METHODS = ("pca", "umap")
MOST_POINTS = 5_000  # that a browser draws at ease
COLUMNS = ("song_id", "split", "start_seconds", "stem", "tags", "instruction", "embedding")


def read(path: Path) -> list[dict[str, Any]]:
    """The table's rows without latents; of more than `MOST_POINTS`, that many evenly spaced ones.

    Raises:
      UserError: the file is missing, of another kind, or has fewer than three rows.
    """
    try:
        table = pq.read_table(path, columns=list(COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a table of launch.export_latents ({str(error).splitlines()[0]})") from error
    if table.num_columns < len(COLUMNS):
        raise UserError(f"{path}: not a table of launch.export_latents: it has only {', '.join(table.column_names)}")
    if table.num_rows < 3:
        raise UserError(f"{path}: {table.num_rows} windows are too few for a map: export three or more")
    chosen = np.linspace(0, table.num_rows - 1, min(table.num_rows, MOST_POINTS)).round().astype(int)
    return table.take(pa.array(chosen)).to_pylist()


def groups(rows: list[dict[str, Any]], color_by: str) -> list[str]:
    """The group of each row; "untagged" where it has no such tag.

    Raises:
      UserError: no row has such a tag, and no column is called so.
    """
    columns = ("song_id", "split", "stem")
    if color_by in columns:
        return [str(row[color_by]) or "none" for row in rows]
    tags = [json.loads(row["tags"]) for row in rows]
    known = {key for each in tags for key, value in each.items() if isinstance(value, str)}
    if color_by not in known:
        raise unknown_name("--color_by", color_by, [*sorted(known), *columns])
    return [str(each.get(color_by) or "untagged") for each in tags]


def places(embeddings: np.ndarray, method: str) -> tuple[np.ndarray, str]:
    """Positions `[N, 2]` of embeddings `[N, D]`, every dimension at equal spread, and what they are.

    Raises:
      UserError: UMAP is not installed.
    """
    x = (embeddings - embeddings.mean(axis=0)) / (embeddings.std(axis=0) + 1e-6)
    if method == "pca":
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        share = np.square(s[:2]).sum() / max(np.square(s).sum(), 1e-12)
        return u[:, :2] * s[:2], f"The first two principal components, {share:.0%} of the variance."
    try:
        import umap
    except ImportError as error:
        raise UserError("--method=umap needs the extra `map`: pip install 'subtractive-jax[map]'") from error
    mapper = umap.UMAP(n_neighbors=min(15, len(x) - 1), init="pca", random_state=0, n_jobs=1)
    return mapper.fit_transform(x), "UMAP (McInnes et al. 2018): near means alike, far says little."


def main() -> None:
    output = Path(_OUTPUT.value)
    if output.exists():
        raise UserError(f"{output} exists: give another --output, or remove it")
    if _METHOD.value not in METHODS:
        raise unknown_name("--method", _METHOD.value, METHODS)
    rows = read(Path(_INPUT.value))
    colors = groups(rows, _COLOR_BY.value)
    positions, note = places(np.array([row["embedding"] for row in rows], np.float32), _METHOD.value)
    points = [
        scatter.Point(
            group, f"{row['song_id']} at {row['start_seconds']:.1f} s, {group}\n{row['instruction']}".rstrip()
        )
        for row, group in zip(rows, colors, strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    title = f"{len(points)} windows of {len({row['song_id'] for row in rows})} songs by {_COLOR_BY.value}"
    scatter.write(output, title, positions, points, note)
    print(output)


if __name__ == "__main__":
    program.run(main)
