"""Writes latents as a Parquet table, a row a window, for analysis with any data-frame library.

  python -m launch.export_latents --model=tiny --data_dir=DIR --output=latents.parquet [--signal=mix|context|stem]
  python -m launch.export_latents --model=tiny --input=song.wav,other.wav --output=latents.parquet

Columns: song_id, split, start_seconds, stem (the missing one), tags (JSON), instruction (the window's first), latent
(mean of the posterior, unscaled, flattened) and embedding (its mean over time). The schema's metadata holds
`latent_shape` [F, T, C] and `embedding_shape` [F, C], in the order of `numpy.reshape`.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from tqdm import tqdm

import subtractive_jax
from launch import program
from subtractive_jax import fingerprint, records
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models.autoencoder import mode
from subtractive_jax.representation.audio import read_audio, resample, to_mono
from subtractive_jax.representation.level import context_gain

if TYPE_CHECKING:
    from subtractive_jax.model import Model

_MODEL = flags.DEFINE_string("model", None, "Run folder, model folder or name of a shipped model.", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with the `latents` dataset, made with this model's encoders.")
_INPUT = flags.DEFINE_list("input", [], "Audio files, separated by commas; cut into windows that do not overlap.")
_OUTPUT = flags.DEFINE_string("output", None, "Parquet file to write; must not exist.", required=True)
_SIGNAL = flags.DEFINE_string("signal", "mix", "With --data_dir: whose latents, mix, context or stem.")

SIGNALS = ("mix", "context", "stem")
ROWS_AT_ONCE = 256


def from_dataset(model: "Model", data_dir: str, signal: str) -> Iterator[dict[str, Any]]:
    """A row for each example of every split.

    Raises:
      UserError: no such dataset, or one made with other encoders.
    """
    if signal not in SIGNALS:
        raise unknown_name("signal", signal, SIGNALS)
    expected = fingerprint.dataset_hash(
        model.config.representation.to_dict(),
        fingerprint.params_hash(model.params("autoencoder")),
        fingerprint.params_hash(model.params("text_encoder")),
        records.SCHEMA_VERSION,
    )
    found = records.read_metadata(data_dir, "latents")["config_hash"]
    if found != expected:
        raise UserError(
            f"{data_dir}: the latents have config_hash {found}, but the model's encoders give {expected}: "
            "name the model that they were built with"
        )
    keys = (f"{signal}_latent", "song_id", "start_seconds", "stem_name", "tags", "instructions")
    for split in records.SPLITS:
        examples = records.Split(data_dir, "latents", split, keys)
        for example in tqdm(examples, desc=split, unit="window", disable=None):
            yield row(
                example[f"{signal}_latent"],
                song_id=example["song_id"],
                split=split,
                start_seconds=example["start_seconds"],
                stem=example["stem_name"],
                tags=example["tags"],
                instruction=next(iter(example["instructions"]), ""),
            )


def from_audio(model: "Model", paths: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each window of each file; the last window of a file is filled up with silence.

    Raises:
      UserError: a file is missing or not audio.
    """
    rate, window_samples = model.mel.sample_rate, model.mel.window_samples
    distance = model.mel.window_frames * model.mel.hop_length  # no frame is in two windows
    for path in tqdm(paths, unit="file", disable=None):
        audio, sample_rate = read_audio(path)
        mono = resample(to_mono(audio), sample_rate, rate)
        mono = mono * context_gain(mono, rate, model.config.data.loudness_lufs)
        padded = np.pad(mono, (0, window_samples)).astype(np.float32)
        windows = np.stack([padded[start : start + window_samples] for start in range(0, len(mono), distance)])
        for index, moments in enumerate(model.encode_audio(windows)):
            yield row(
                moments,
                song_id=Path(path).stem,
                split="",
                start_seconds=index * distance / rate,
                stem="",
                tags="{}",
                instruction="",
            )


def row(moments: np.ndarray, **about: Any) -> dict[str, Any]:
    """A table row of posterior moments [F, T, 2C]; `latent` [F, T, C] and `embedding` [F, C] float32."""
    latent = np.asarray(mode(jnp.asarray(moments, jnp.float32)))
    return {**about, "latent": latent, "embedding": latent.mean(axis=1)}


def schema(first: dict[str, Any], about: dict[str, str]) -> pa.Schema:
    """The table's columns, and the shapes of its lists, from one row."""
    arrays = {name: first[name] for name in ("latent", "embedding")}
    texts = ("stem", "tags", "instruction")
    return pa.schema(
        [("song_id", pa.string()), ("split", pa.string()), ("start_seconds", pa.float32())]
        + [(name, pa.string()) for name in texts]
        + [(name, pa.list_(pa.float32(), array.size)) for name, array in arrays.items()],
        metadata=about | {f"{name}_shape": json.dumps(array.shape) for name, array in arrays.items()},
    )


def write(path: Path, rows: Iterator[dict[str, Any]], about: dict[str, str]) -> int:
    """Writes the table, whole or not at all, and returns its number of rows.

    Raises:
      UserError: there are no rows.
    """
    first = next(rows, None)
    if first is None:
        raise UserError("there are no windows to export")
    columns = schema(first, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    count, block = 0, [first]
    try:
        with pq.ParquetWriter(temporary, columns) as writer:
            while block:
                flat = [
                    {**item, "latent": item["latent"].ravel(), "embedding": item["embedding"].ravel()} for item in block
                ]
                writer.write_table(pa.Table.from_pylist(flat, schema=columns))
                count += len(block)
                block = list(itertools.islice(rows, ROWS_AT_ONCE))
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return count


def main() -> None:
    output = Path(_OUTPUT.value)
    if output.exists():
        raise UserError(f"{output} exists: give another --output, or remove it")
    if bool(_DATA_DIR.value) == bool(_INPUT.value):
        raise UserError("give either --data_dir or --input")
    model = subtractive_jax.load(_MODEL.value)
    if _DATA_DIR.value:
        rows, signal = from_dataset(model, _DATA_DIR.value, _SIGNAL.value), _SIGNAL.value
    else:
        rows, signal = from_audio(model, _INPUT.value), "input"
    count = write(output, rows, {"model": _MODEL.value, "signal": signal})
    print(f"{output}: {count} windows")


if __name__ == "__main__":
    program.run(main)
