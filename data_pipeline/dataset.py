"""The two datasets on disk: features, shard files, metadata. A dataset appears under its name only when complete."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from subtractive_jax import records
from subtractive_jax.errors import UserError


def features(name: str, shapes: Mapping[str, tuple[int | None, ...]]) -> tfds.features.FeaturesDict:
    """The TFDS features of `windows` or `latents`; `shapes` fixes those of tensors."""

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
                return tfds.features.Tensor(shape=shapes[key], dtype=spec.dtype, encoding="bytes")

    return tfds.features.FeaturesDict({key: feature(key, spec) for key, spec in records.SCHEMAS[name].items()})


def serialize(schema: tfds.features.FeaturesDict, example: Mapping[str, Any]) -> bytes:
    """A `tf.train.Example`; equal examples give equal bytes in every process."""
    # Protobuf orders maps differently from process to process unless told otherwise.
    return tf.train.Example.FromString(schema.serialize_example(example)).SerializeToString(deterministic=True)


def shard_name(name: str, split: str, index: int, count: int) -> str:
    return f"{name}-{split}.tfrecord-{index:05d}-of-{count:05d}"


def write_shard(path: Path, payloads: Iterable[bytes]) -> int:
    """Writes a TFRecord file, whole or not at all; its number of bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    size = 0
    try:
        with open(temporary, "wb") as file:
            for payload in payloads:
                size += file.write(records.frame(payload))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


@contextlib.contextmanager
def new_dataset(data_dir: str, name: str) -> Iterator[Path]:
    """A folder to write a dataset into; it becomes `data_dir`'s when the block ends without an error.

    Raises:
      UserError: the dataset is there already.
    """
    final = records.dataset_dir(data_dir, name)
    if final.exists():
        raise UserError(f"{final}: already there; delete it, or give another --data_dir")
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=final.parent))
    folder = records.dataset_dir(staging, name)  # TFDS reads name and version from the path
    try:
        folder.mkdir(parents=True)
        yield folder
        os.replace(folder, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finish(
    folder: Path,
    name: str,
    schema: tfds.features.FeaturesDict,
    shards: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    rejected: Sequence[Mapping[str, Any]],
) -> None:
    """Writes what stands beside the shards: TFDS's description, `metadata.json` and `rejected.jsonl`.

    Args:
      shards: for each shard, `split`, `index`, `examples`, `bytes` and `counts` (examples by stem).
    """
    counts: dict[str, dict[str, int]] = {split: {} for split in records.SPLITS}
    split_infos = []
    for split in records.SPLITS:
        own = sorted((shard for shard in shards if shard["split"] == split), key=lambda shard: shard["index"])
        for shard in own:
            for stem, count in shard["counts"].items():
                counts[split][stem] = counts[split].get(stem, 0) + count
        if own:
            lengths, size = [shard["examples"] for shard in own], sum(shard["bytes"] for shard in own)
            split_infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=schema,
        split_infos=split_infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
    )
    (folder / "metadata.json").write_text(json.dumps({**metadata, "counts": counts}, indent=1, sort_keys=True) + "\n")
    lines = sorted(json.dumps(item, sort_keys=True) for item in rejected)
    (folder / "rejected.jsonl").write_text("".join(f"{line}\n" for line in lines))
