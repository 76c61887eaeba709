"""Measures generated music: Fréchet distance, Fréchet audio distance and KL divergence, with intervals and counts.

  python -m launch.evaluate --reference=DIR --candidate=DIR --output=OUT [--embedder=musicnn]
      two folders of audio; files of the same name (suffix aside) are pairs
  python -m launch.evaluate --paper_table --model=MODEL [--mix_model=MODEL] --data_dir=DIR --output=OUT
      the model, its SDEdit baseline and the framing rows on windows kept out of training

Writes OUT/table.json and OUT/table.csv.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import subtractive_jax
from launch import program
from subtractive_jax.errors import UserError
from subtractive_jax.evaluation import paper_table, table
from subtractive_jax.evaluation.embedders import Embedder, load_embedder
from subtractive_jax.representation.audio import FORMATS, read_audio, to_mono

_REFERENCE = flags.DEFINE_string("reference", None, "Folder of real audio.")
_CANDIDATE = flags.DEFINE_string("candidate", None, "Folder of generated audio.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)
_EMBEDDER = flags.DEFINE_string("embedder", "musicnn", "The network behind the distances.")
_PAPER_TABLE = flags.DEFINE_bool("paper_table", False, "Measure a model on a dataset instead of two folders.")
_MODEL = flags.DEFINE_string("model", None, "With --paper_table: run folder, model folder or shipped name.")
_MIX_MODEL = flags.DEFINE_string("mix_model", None, "With --paper_table: a second model, of the other target.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "With --paper_table: folder with the `windows` dataset.")
_SPLIT = flags.DEFINE_string("split", "test", "With --paper_table: the split to measure on.")
_STEM = flags.DEFINE_string("stem", "drums", "With --paper_table: the stem to insert.")
_NUM_WINDOWS = flags.DEFINE_integer("num_windows", 64, "With --paper_table: windows to measure on.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", None, "With --paper_table: sampling steps; the models' own unless given.")


def audio_files(folder: str) -> list[Path]:
    """A folder's audio files, by name.

    Raises:
      UserError: no such folder, no audio in it, or two files of one name.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower().removeprefix(".") in FORMATS)
    if not paths:
        raise UserError(f"{folder}: no {', '.join(FORMATS)} files in it")
    names = [path.stem for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f'{folder}: several files are named "{min(twice)}": keep one of them')
    return paths


def recordings(paths: Sequence[Path]) -> Iterator[tuple[str, np.ndarray, int]]:
    """(name without suffix, mono audio, sample rate in Hz) of each file."""
    for path in tqdm(paths, desc=str(paths[0].parent), leave=False):
        audio, sample_rate = read_audio(path)
        yield path.stem, to_mono(audio), sample_rate


def folders(embedder: Embedder) -> tuple[list[table.Row], dict[str, Any]]:
    """The one-row table of two folders."""
    if not _REFERENCE.value or not _CANDIDATE.value:
        raise UserError("give --reference=DIR and --candidate=DIR, or --paper_table with --model and --data_dir")
    reference, candidate = audio_files(_REFERENCE.value), audio_files(_CANDIDATE.value)
    row = table.compare(
        _CANDIDATE.value,
        table.embed_all(embedder, recordings(reference)),
        table.embed_all(embedder, recordings(candidate)),
    )
    return [row], {"reference": _REFERENCE.value, "reference_count": len(reference)}


def paper(embedder: Embedder) -> tuple[list[table.Row], dict[str, Any]]:
    """The paper's table on windows of a dataset."""
    if not _MODEL.value or not _DATA_DIR.value:
        raise UserError("--paper_table needs --model=MODEL and --data_dir=DIR")
    windows = paper_table.read_windows(_DATA_DIR.value, _SPLIT.value, _STEM.value, _NUM_WINDOWS.value)
    models = [subtractive_jax.load(name) for name in (_MODEL.value, _MIX_MODEL.value) if name]
    rows = paper_table.measure(embedder, models, windows, _STEPS.value)
    about = {
        "reference": f"true mixes, {_SPLIT.value} split of {_DATA_DIR.value}",
        "reference_count": len(windows),
        "model": _MODEL.value,
        "mix_model": _MIX_MODEL.value,
        "stem": _STEM.value,
        "steps": _STEPS.value,
    }
    return rows, about


def write(output: Path, rows: Sequence[table.Row], about: dict[str, Any]) -> None:
    """Writes the folder, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        document = {**about, "rows": [row.as_json() for row in rows]}
        (temporary / "table.json").write_text(json.dumps(document, indent=2) + "\n")
        (temporary / "table.csv").write_text(table.to_csv(rows))
        temporary.chmod(0o755)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def main() -> None:
    output = Path(_OUTPUT.value)
    if output.exists():
        raise UserError(f"{output} exists: give another --output")
    embedder = load_embedder(_EMBEDDER.value)
    rows, about = paper(embedder) if _PAPER_TABLE.value else folders(embedder)
    write(output, rows, {"embedder": embedder.name, **about})
    print(table.to_text(rows))
    print(output / "table.json")


if __name__ == "__main__":
    program.run(main)
