"""The two datasets' schema, and TFRecord files read without TensorFlow: any record at any time, checksums verified."""

import functools
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from subtractive_jax import protobuf
from subtractive_jax.errors import UserError

SCHEMA_VERSION = 1
DATASET_VERSION = "1.0.0"  # of the TFDS folder layout
SPLITS = ("train", "validation", "test")


class Feature(NamedTuple):
    """One key of an example, as TFDS stores it.

    `kind` is `bytes` (a file's content), `text`, `texts` (a sequence of text), `scalar`, or `tensor`
    (`tfds.features.Tensor(shape, dtype, encoding="bytes")`). A None in `shape` is fixed by the dataset, or varies.
    """

    kind: str
    dtype: type | None = None
    shape: tuple[int | None, ...] = ()


_ABOUT = {
    "stem_name": Feature("text"),  # the missing stems, sorted and joined by "+"
    "song_id": Feature("text"),
    "group_id": Feature("text"),  # what splits never straddle: album, piece, groove family
    "start_seconds": Feature("scalar", np.float32),
    "gain": Feature("scalar", np.float32),  # to the level that models are trained at; the audio is not multiplied by it
    "tags": Feature("text"),  # JSON
    "caption": Feature("text"),
    "instructions": Feature("texts"),
}
WINDOWS = {
    "mix": Feature("bytes"),  # FLAC, 16 bit, mono
    "context": Feature("bytes"),
    "stem": Feature("bytes"),
    "sample_rate": Feature("scalar", np.int64),  # Hz
    **_ABOUT,
}
LATENTS = {
    # [F, T, 2C]: mean and log-variance of the autoencoder's posterior, unscaled
    "mix_latent": Feature("tensor", np.float16, (None, None, None)),
    "context_latent": Feature("tensor", np.float16, (None, None, None)),
    "stem_latent": Feature("tensor", np.float16, (None, None, None)),
    "instruction_states": Feature("tensor", np.float16, (None, None)),  # [sum of lengths, D]
    "instruction_lengths": Feature("tensor", np.int32, (None,)),  # [K]
    "caption_states": Feature("tensor", np.float16, (None, None)),  # [L, D]
    **_ABOUT,
}
SCHEMAS = {"windows": WINDOWS, "latents": LATENTS}


# TFRecord framing: length uint64, masked CRC-32C of it, payload, masked CRC-32C of that; all little-endian.

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(payload))
    return b"".join((length, _FOOTER.pack(_masked_crc(length)), payload, _FOOTER.pack(_masked_crc(payload))))


class Extent(NamedTuple):
    """Where a record's payload lies in its file, and its stored checksum."""

    offset: int  # bytes
    length: int  # bytes
    crc: int


def _damaged(path: str | os.PathLike[str], offset: int, what: str) -> UserError:
    return UserError(f"{path}: {what} at byte {offset}; copy or build the file again")


def scan(path: str | os.PathLike[str]) -> list[Extent]:
    """The records of a TFRecord file, without reading their payloads.

    Raises:
      UserError: the file is truncated, or a length does not match its checksum.
    """
    extents = []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        offset = 0
        while offset < size:
            file.seek(offset)
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise _damaged(path, offset, "truncated record")
            length, crc = _HEADER.unpack(header)
            if crc != _masked_crc(header[:8]):
                raise _damaged(path, offset, "damaged record length")
            start = offset + _HEADER.size
            offset = start + length + _FOOTER.size
            if offset > size:
                raise _damaged(path, start, "truncated record")
            file.seek(start + length)
            extents.append(Extent(start, length, *_FOOTER.unpack(file.read(_FOOTER.size))))
    return extents


def read_payload(path: str | os.PathLike[str], extent: Extent) -> bytes:
    """One record's payload.

    Raises:
      UserError: it does not match its checksum.
    """
    with open(path, "rb") as file:
        file.seek(extent.offset)
        payload = file.read(extent.length)
    if _masked_crc(payload) != extent.crc:
        raise _damaged(path, extent.offset, "damaged record")
    return payload


def read_tfrecord(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """All payloads of a TFRecord file in order."""
    return (read_payload(path, extent) for extent in scan(path))


def _decode_list(kind: int, data: memoryview) -> list[bytes] | np.ndarray:
    if kind == 1:  # BytesList
        return [bytes(value) for _, _, value in protobuf.fields(data)]
    if kind == 2:  # FloatList, packed or not
        return np.frombuffer(b"".join(value for _, _, value in protobuf.fields(data)), "<f4")
    packed_or_not = (  # Int64List
        protobuf.varints(value) if wire_type == protobuf.LENGTH_DELIMITED else (value,)
        for _, wire_type, value in protobuf.fields(data)
    )
    return np.array([value for values in packed_or_not for value in values], np.uint64).astype(np.int64)


def decode_example(payload: bytes) -> dict[str, list[bytes] | np.ndarray]:
    """A serialised `tf.train.Example` as key -> list of bytes, float32 array or int64 array.

    Raises:
      ValueError: it is not one.
    """
    example: dict[str, list[bytes] | np.ndarray] = {}
    try:
        for _, _, features in protobuf.fields(memoryview(payload)):
            for _, _, entry in protobuf.fields(features):
                pair = {number: value for number, _, value in protobuf.fields(entry)}
                lists = [_decode_list(kind, data) for kind, _, data in protobuf.fields(pair.get(2, memoryview(b"")))]
                example[bytes(pair[1]).decode()] = lists[0] if lists else []
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError("not a tf.train.Example") from error
    return example


def decode_feature(feature: Feature, value: list[bytes] | np.ndarray) -> Any:
    """The Python or numpy value of one key of an example."""
    if feature.kind == "texts":
        return [item.decode() for item in value]
    if feature.kind == "text":
        return value[0].decode()
    if feature.kind == "bytes":
        return value[0]
    assert feature.dtype is not None
    if feature.kind == "scalar":
        return feature.dtype(value[0])
    return np.frombuffer(value[0], feature.dtype).reshape([-1 if size is None else size for size in feature.shape])


# Datasets on disk.


def dataset_dir(data_dir: str | os.PathLike[str], name: str) -> Path:
    return Path(data_dir) / name / DATASET_VERSION


def read_metadata(data_dir: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """`metadata.json` of dataset `windows` or `latents`.

    Raises:
      UserError: there is no such dataset, or it was written for another schema.
    """
    path = dataset_dir(data_dir, name) / "metadata.json"
    if not path.is_file():
        raise UserError(
            f'no dataset "{name}" in {data_dir} ({path} is missing): run python -m data_pipeline.build first'
        )
    metadata = json.loads(path.read_text())
    version = metadata.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {version}, but this code reads {SCHEMA_VERSION}: build the dataset again"
        )
    return metadata


def _tensor_shapes(features_json: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    features = features_json["featuresDict"]["features"]
    shapes = {}
    for key, feature in features.items():
        sizes = [int(size) for size in feature.get("tensor", {}).get("shape", {}).get("dimensions", ())]
        shapes[key] = tuple(None if size < 0 else size for size in sizes)
    return shapes


class Split:
    """One split of a dataset: random access to its examples, decoded by the schema.

    Args:
      data_dir: the folder that holds `windows/` and `latents/`.
      name: `windows` or `latents`.
      split: `train`, `validation` or `test`.
      keys: decode only these; all of the schema's when None.

    Raises:
      UserError: the dataset is missing, incomplete or damaged.
    """

    def __init__(
        self, data_dir: str | os.PathLike[str], name: str, split: str, keys: Iterable[str] | None = None
    ) -> None:
        directory = dataset_dir(data_dir, name)
        self.metadata = read_metadata(data_dir, name)
        shapes = _tensor_shapes(json.loads((directory / "features.json").read_text()))
        self.features = {
            key: feature._replace(shape=shapes[key]) if feature.kind == "tensor" else feature
            for key, feature in SCHEMAS[name].items()
            if keys is None or key in keys
        }
        files = sorted(directory.glob(f"{name}-{split}.tfrecord-*-of-*"))
        for path in files:
            count = int(path.name.rpartition("-of-")[2])
            if count != len(files):
                raise UserError(f"{path}: one of {count} shards, but {len(files)} are there; build the dataset again")
        self._records = [(path, extent) for path in files for extent in scan(path)]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, extent = self._records[index]
        try:
            example = decode_example(read_payload(path, extent))
            return {key: decode_feature(feature, example[key]) for key, feature in self.features.items()}
        except KeyError as error:
            raise UserError(f"{path}: a record has no key {error}; build the dataset again") from error
        except ValueError as error:
            raise _damaged(path, extent.offset, f"unreadable record ({error})") from error

    @property
    def nbytes(self) -> int:
        """Size of all payloads."""
        return sum(extent.length for _, extent in self._records)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the lengths and checksums of all records in order: equal for equal content."""
        lengths_and_crcs = np.array([(extent.length, extent.crc) for _, extent in self._records], np.uint64)
        return hashlib.sha256(lengths_and_crcs.tobytes()).hexdigest()
