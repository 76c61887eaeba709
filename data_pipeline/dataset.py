"""The two datasets on disk: features, shard files, metadata. A dataset appears under its name only when complete."""

import contextlib
import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from data_pipeline import files
from subtractive_jax import records
from subtractive_jax.errors import UserError

_LAST = "metadata.json"  # a dataset is there when this is


def features(
    name: str, shapes: Mapping[str, tuple[int | None, ...]], zlib: Container[str] = ()
) -> tfds.features.FeaturesDict:
    """The TFDS features of `windows` or `latents`; `shapes` are those of tensors, `zlib` names the compressed ones."""

    def feature(key: str, spec: records.Feature) -> Any:
        match spec.kind:
            case "text":
                return tfds.features.Text()
            case "texts":
                return tfds.features.Sequence(tfds.features.Text())
            case "bytes":
                return tfds.features.Scalar(np.object_)
            case "scalar":
                return tfds.features.Scalar(spec.dtype)
            case _:
                encoding = "zlib" if key in zlib else "bytes"
                return tfds.features.Tensor(shape=shapes[key], dtype=spec.dtype, encoding=encoding)

    return tfds.features.FeaturesDict({key: feature(key, spec) for key, spec in records.SCHEMAS[name].items()})


def serialize(schema: tfds.features.FeaturesDict, example: Mapping[str, Any]) -> bytes:
    """A `tf.train.Example`; equal examples give equal bytes in every process."""
    # Protobuf orders maps differently from process to process unless told otherwise.
    return tf.train.Example.FromString(schema.serialize_example(example)).SerializeToString(deterministic=True)


def shard_name(name: str, split: str, index: int, count: int) -> str:
    return f"{name}-{split}.tfrecord-{index:05d}-of-{count:05d}"


def write_shard(path: str, payloads: Iterable[bytes]) -> int:
    """Writes a TFRecord file and its index, whole or not at all; the file's number of bytes."""
    temporary = f"{path}.{uuid.uuid4().hex}"
    index = temporary + records.INDEX_SUFFIX
    try:
        with files.create(temporary) as file:
            content = records.write_records(file, payloads)
        files.write_bytes(index, content)
        size = files.size(temporary)
        files.move([(index, path + records.INDEX_SUFFIX), (temporary, path)])
    except BaseException:
        files.delete([path for path in (temporary, index) if files.exists(path)])
        raise
    return size


def read_shard(path: str) -> Iterator[bytes]:
    """All payloads of a TFRecord file in order."""
    with files.open_file(path) as file:
        yield from records.read_records(file, path)


def folder(data_dir: str, name: str) -> str:
    return files.join(data_dir, name, records.DATASET_VERSION)


def is_complete(data_dir: str, name: str) -> bool:
    return files.exists(files.join(folder(data_dir, name), _LAST))


@contextlib.contextmanager
def new_dataset(data_dir: str, name: str) -> Iterator[str]:
    """A folder to write a dataset into; it becomes `data_dir`'s when the block ends without an error.

    Raises:
      UserError: the dataset is there already.
    """
    final = folder(data_dir, name)
    if is_complete(data_dir, name):
        raise UserError(f"{final}: already there; delete it, or give another --data_dir")
    parent = files.join(data_dir, name)
    left = {path.partition("/")[0] for path in files.list_files(parent) if path.startswith(".incomplete-")}
    for leftover in sorted(left):
        print(f"{files.join(parent, leftover)}: left by a build that did not end; delete it if none is running")
    staging = files.join(data_dir, name, f".incomplete-{uuid.uuid4().hex[:12]}")
    files.make_folder(staging)
    try:
        yield staging
    except BaseException:
        files.delete_folder(staging)
        raise
    files.move_folder(staging, final, last=_LAST)


def write_rows(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines, sorted, so that they do not tell who came first."""
    lines = sorted(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    files.write_bytes(path, "".join(lines).encode())


def finish(
    staging: str,
    name: str,
    schema: tfds.features.FeaturesDict,
    shards: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    rejected: Sequence[Mapping[str, Any]],
    notes: Sequence[Mapping[str, Any]],
) -> None:
    """Writes what stands beside the shards: TFDS's description, `metadata.json`, `rejected.jsonl`, `notes.jsonl`.

    Args:
      shards: for each shard, `split`, `index`, `examples`, `bytes`, `songs`, `counts` (examples by stem) and
        `genres` (examples by genre).
    """
    tables: dict[str, dict[str, dict[str, int]]] = {
        table: {
            split: sum((Counter(shard[table]) for shard in shards if shard["split"] == split), Counter())
            for split in records.SPLITS
        }
        for table in ("counts", "genres")
    }
    songs = {split: sum(shard["songs"] for shard in shards if shard["split"] == split) for split in records.SPLITS}
    split_infos = []
    for split in records.SPLITS:
        own = sorted((shard for shard in shards if shard["split"] == split), key=lambda shard: shard["index"])
        if own:
            lengths, size = [shard["examples"] for shard in own], sum(shard["bytes"] for shard in own)
            split_infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch, name, records.DATASET_VERSION)  # TFDS reads name and version from the path
        local.mkdir(parents=True)
        for path in files.list_files(staging):
            (local / path).touch()  # TFDS looks for the shards' names
        tfds.folder_dataset.write_metadata(
            data_dir=local,
            features=schema,
            split_infos=split_infos,
            filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            check_data=False,
        )
        for written in (local / "dataset_info.json", local / "features.json"):
            files.write_bytes(files.join(staging, written.name), written.read_bytes())
    for beside, rows in (("rejected.jsonl", rejected), ("notes.jsonl", notes)):
        if rows or files.is_local(staging):  # Beam cannot write an empty file to S3
            write_rows(files.join(staging, beside), rows)
    text = json.dumps({**metadata, **tables, "songs": songs}, indent=1, sort_keys=True) + "\n"
    files.write_bytes(files.join(staging, _LAST), text.encode())
