"""The two datasets' schema, and TFRecord files read without TensorFlow: any record at any time, checksums verified."""

import functools
import hashlib
import itertools
import json
import os
import re
import struct
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import google_crc32c
import numpy as np
from tqdm import tqdm

from subtractive_jax import protobuf, storage
from subtractive_jax.errors import UserError

SCHEMA_VERSION = 1
DATASET_VERSION = "1.0.0"  # of the TFDS folder layout
SPLITS = ("train", "validation", "test")


class Feature(NamedTuple):
    """One key of an example, as TFDS stores it.

    `kind` is `bytes` (a file's content), `text`, `texts` (a sequence of text), `scalar`, or `tensor`
    (`tfds.features.Tensor(shape, dtype, encoding)`). A None in `shape` is fixed by the dataset, or varies; so is the
    `encoding` of tensors, `bytes` or `zlib`.
    """

    kind: str
    dtype: type | None = None
    shape: tuple[int | None, ...] = ()
    encoding: str = "bytes"


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
    "mix": Feature("bytes"),  # FLAC, 16 bit, mono; or of notes a MIDI file, see data_pipeline/note_windows.py
    "context": Feature("bytes"),
    "stem": Feature("bytes"),
    "sample_rate": Feature("scalar", np.int64),  # Hz; 0 for notes
    **_ABOUT,
}
LATENTS = {
    # [F, T, 2C]: mean and log-variance of the autoencoder's posterior, unscaled; or a piano roll [F, T, C], whose
    # context has more channels
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
#
# Beside a file, `<file>.index` holds the length and masked CRC-32C (both uint32) of its payloads in order, as the one
# record of a TFRecord file. With it, a remote file is opened without being read.

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_FRAMING = _HEADER.size + _FOOTER.size
INDEX_SUFFIX = ".index"
_INDEX_DTYPE = np.dtype("<u4")
_SCANNERS = 16  # threads
_PIECE = 64 << 20  # bytes of payloads that are read at once when all are read


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(payload))
    return b"".join((length, _FOOTER.pack(_masked_crc(length)), payload, _FOOTER.pack(_masked_crc(payload))))


def write_records(file: BinaryIO, payloads: Iterable[bytes]) -> bytes:
    """Writes a TFRecord file; returns the content of its index file."""
    index = []
    for payload in payloads:
        record = frame(payload)
        file.write(record)
        index.append((len(payload), _FOOTER.unpack(record[-_FOOTER.size :])[0]))
    return frame(np.array(index, _INDEX_DTYPE).tobytes())


def _damaged(path: str, offset: int, what: str) -> UserError:
    return UserError(f"{path}: {what} at byte {offset}; copy or build the file again")


def _scan(file: BinaryIO, path: str) -> np.ndarray:
    """Length and stored checksum of each record of a TFRecord file [records, 2], without its payloads.

    Raises:
      UserError: the file is truncated, or a length does not match its checksum.
    """
    index = []
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    offset = 0
    header = file.read(_HEADER.size)
    while offset < size:
        if len(header) < _HEADER.size:
            raise _damaged(path, offset, "truncated record")
        length, crc = _HEADER.unpack(header)
        if crc != _masked_crc(header[:8]):
            raise _damaged(path, offset, "damaged record length")
        end = offset + _HEADER.size + length
        if end + _FOOTER.size > size:
            raise _damaged(path, offset + _HEADER.size, "truncated record")
        file.seek(end)
        footer_and_header = file.read(_FRAMING)
        index.append((length, _FOOTER.unpack(footer_and_header[: _FOOTER.size])[0]))
        offset, header = end + _FOOTER.size, footer_and_header[_FOOTER.size :]
    return np.array(index, _INDEX_DTYPE).reshape(-1, 2)


def _parse_index(content: bytes, path: str, shard_size: int) -> np.ndarray:
    payload = content[_HEADER.size : -_FOOTER.size]
    if content != frame(payload) or len(payload) % (2 * _INDEX_DTYPE.itemsize):
        raise UserError(f"{path}: damaged index; delete it, or build the file again")
    index = np.frombuffer(payload, _INDEX_DTYPE).reshape(-1, 2)
    expected = int(index[:, 0].sum(dtype=np.int64)) + _FRAMING * len(index)
    if shard_size != expected:
        shard = path.removesuffix(INDEX_SUFFIX)
        raise UserError(f"{shard}: {shard_size} bytes, but by its index {expected}; copy or build the file again")
    return index


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Where the payloads of a file begin, from their lengths [records]."""
    return np.cumsum(lengths + np.int64(_FRAMING)) - lengths - _FOOTER.size


def _indexes(folder: storage.Folder, sizes: Mapping[str, int], shards: Sequence[str]) -> list[np.ndarray]:
    """`_scan` of each shard; read from the index files where there are any."""
    indexed = [shard for shard in shards if shard + INDEX_SUFFIX in sizes]
    contents = folder.read_ranges([(shard + INDEX_SUFFIX, 0, sizes[shard + INDEX_SUFFIX]) for shard in indexed])
    indexes = {
        shard: _parse_index(content, storage.join(folder.path, shard + INDEX_SUFFIX), sizes[shard])
        for shard, content in zip(indexed, contents, strict=True)
    }
    scanned = [shard for shard in shards if shard not in indexes]

    def scan(shard: str) -> np.ndarray:
        with folder.open(shard) as file:
            return _scan(file, storage.join(folder.path, shard))

    with ThreadPoolExecutor(_SCANNERS, thread_name_prefix="scan") as pool:
        found = tqdm(
            pool.map(scan, scanned), total=len(scanned), desc="scanning", unit="shard", disable=None, leave=False
        )
        indexes |= zip(scanned, found, strict=True)
    return [indexes[shard] for shard in shards]


def read_records(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The payloads of a TFRecord file in order; `path` is what errors call it.

    Raises:
      UserError: the file is truncated or damaged.
    """
    offset = 0
    while header := file.read(_HEADER.size):
        if len(header) < _HEADER.size:
            raise _damaged(path, offset, "truncated record")
        length, crc = _HEADER.unpack(header)
        if crc != _masked_crc(header[:8]):
            raise _damaged(path, offset, "damaged record length")
        payload, footer = file.read(length), file.read(_FOOTER.size)
        if len(footer) < _FOOTER.size:
            raise _damaged(path, offset, "truncated record")
        if _FOOTER.unpack(footer)[0] != _masked_crc(payload):
            raise _damaged(path, offset, "damaged record")
        yield payload
        offset += length + _FRAMING


def _decode_list(kind: int, data: memoryview) -> list[memoryview] | np.ndarray:
    if kind == 1:  # BytesList
        return [value for _, _, value in protobuf.fields(data)]
    if kind == 2:  # FloatList, packed or not
        return np.frombuffer(b"".join(value for _, _, value in protobuf.fields(data)), "<f4")
    packed_or_not = (  # Int64List
        protobuf.varints(value) if wire_type == protobuf.LENGTH_DELIMITED else (value,)
        for _, wire_type, value in protobuf.fields(data)
    )
    return np.array([value for values in packed_or_not for value in values], np.uint64).astype(np.int64)


def decode_example(payload: bytes, keys: Container[str] | None = None) -> dict[str, list[memoryview] | np.ndarray]:
    """A serialised `tf.train.Example` as key -> list of bytes (views of the payload), float32 array or int64 array.

    Args:
      keys: decode only these; all when None.

    Raises:
      ValueError: it is not one.
    """
    example: dict[str, list[memoryview] | np.ndarray] = {}
    try:
        for _, _, features in protobuf.fields(memoryview(payload)):
            for _, _, entry in protobuf.fields(features):
                items = protobuf.fields(entry)  # key, then value: every writer of maps puts them in this order
                _, _, name = next(items)
                key = str(name, "utf-8")
                if keys is None or key in keys:
                    lists = [
                        _decode_list(kind, data) for _, _, value in items for kind, _, data in protobuf.fields(value)
                    ]
                    example[key] = lists[0] if lists else []
    except (IndexError, KeyError, StopIteration, TypeError, UnicodeDecodeError) as error:
        raise ValueError("not a tf.train.Example") from error
    return example


def decode_feature(feature: Feature, value: list[memoryview] | np.ndarray) -> Any:
    """The Python or numpy value of one key of an example; a tensor that is not compressed is a view of the payload.

    Raises:
      ValueError: a compressed tensor cannot be unpacked.
    """
    if feature.kind == "texts":
        return [str(item, "utf-8") for item in value]
    if feature.kind == "text":
        return str(value[0], "utf-8")
    if feature.kind == "bytes":
        return bytes(value[0])
    assert feature.dtype is not None
    if feature.kind == "scalar":
        return feature.dtype(value[0])
    data: bytes | memoryview = value[0]
    if feature.encoding == "zlib":
        try:
            data = zlib.decompress(data)
        except zlib.error as error:
            raise ValueError(error) from error
    return np.frombuffer(data, feature.dtype).reshape([-1 if size is None else size for size in feature.shape])


# Datasets: folders of such files, local or remote.


@overload
def dataset_dir(data_dir: str, name: str) -> str: ...
@overload
def dataset_dir(data_dir: Path, name: str) -> Path: ...
def dataset_dir(data_dir: str | Path, name: str) -> str | Path:
    """The folder of dataset `windows` or `latents` under a local path or a URL."""
    if isinstance(data_dir, Path):
        return data_dir / name / DATASET_VERSION
    return storage.join(data_dir, name, DATASET_VERSION)


def _metadata(folder: storage.Folder, sizes: Mapping[str, int], name: str) -> dict[str, Any]:
    path = storage.join(folder.path, "metadata.json")
    if "metadata.json" not in sizes:
        raise UserError(f'no dataset "{name}" ({path} is missing): run python -m data_pipeline.build first')
    metadata = json.loads(folder.read("metadata.json"))
    version = metadata.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {version}, but this code reads {SCHEMA_VERSION}: build the dataset again"
        )
    return metadata


def read_metadata(data_dir: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """`metadata.json` of dataset `windows` or `latents`.

    Raises:
      UserError: there is no such dataset, or it was written for another schema.
    """
    folder = storage.Folder(dataset_dir(os.fspath(data_dir), name))
    return _metadata(folder, folder.sizes(), name)


def _described(key: str, feature: Feature, features_json: Mapping[str, Any]) -> Feature:
    """The feature with what the dataset says about it."""
    if feature.kind != "tensor":
        return feature
    told = features_json["featuresDict"]["features"][key]["tensor"]
    sizes = [int(size) for size in told["shape"].get("dimensions", ())]
    return feature._replace(
        shape=tuple(None if size < 0 else size for size in sizes), encoding=told.get("encoding", "bytes")
    )


def _shards(sizes: Mapping[str, int], name: str, split: str, folder: str) -> list[str]:
    pattern = re.compile(rf"{name}-{split}\.tfrecord-\d+-of-(\d+)")
    matches = [match for match in map(pattern.fullmatch, sizes) if match]
    for match in matches:
        if int(match[1]) != len(matches):
            path = storage.join(folder, match[0])
            raise UserError(
                f"{path}: one of {int(match[1])} shards, but {len(matches)} are there; build the dataset again"
            )
    return [match[0] for match in matches]


class Split:
    """One split of a dataset: random access to its examples, decoded by the schema. Threads may share it.

    Holds 16 bytes of memory a record.

    Args:
      data_dir: the folder that holds `windows/` and `latents/`: a path, or a URL that fsspec knows.
      name: `windows` or `latents`.
      split: `train`, `validation` or `test`.
      keys: decode only these; all of the schema's when None.

    Raises:
      UserError: the dataset is missing, incomplete or damaged, or cannot be read.
    """

    def __init__(
        self, data_dir: str | os.PathLike[str], name: str, split: str, keys: Iterable[str] | None = None
    ) -> None:
        self._folder = storage.Folder(dataset_dir(os.fspath(data_dir), name))
        sizes = self._folder.sizes()
        self.metadata = _metadata(self._folder, sizes, name)
        told = json.loads(self._folder.read("features.json"))
        keys = None if keys is None else set(keys)
        self.features = {
            key: _described(key, feature, told) for key, feature in SCHEMAS[name].items() if keys is None or key in keys
        }
        self._shards = _shards(sizes, name, split, self._folder.path)
        indexes = _indexes(self._folder, sizes, self._shards)
        self._first = np.cumsum([0, *map(len, indexes)])  # record of each shard
        self._index = np.concatenate([np.zeros((0, 2), _INDEX_DTYPE), *indexes])
        self._offsets = np.concatenate([np.zeros(0, np.int64), *(_offsets(index[:, 0]) for index in indexes)])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read([index])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All examples in order, read in large pieces."""
        pieces = np.cumsum(self._index[:, 0], dtype=np.int64) // _PIECE
        ends = np.flatnonzero(np.diff(pieces, append=-1)) + 1
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            yield from self.read(range(start, end))

    def read(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Examples; if the dataset is remote, fetched in parallel.

        Raises:
          UserError: a record is damaged, or a file cannot be read.
        """
        indices = np.asarray(indices, np.int64)
        shards = np.searchsorted(self._first, indices, side="right") - 1
        names = [self._shards[shard] for shard in shards.tolist()]
        offsets, index = self._offsets[indices].tolist(), self._index[indices].tolist()
        ranges = [
            (name, offset, offset + length) for name, offset, (length, _) in zip(names, offsets, index, strict=True)
        ]
        payloads = self._folder.read_ranges(ranges)
        return [
            self._decode(payload, crc, name, offset)
            for payload, (_, crc), name, offset in zip(payloads, index, names, offsets, strict=True)
        ]

    def _decode(self, payload: bytes, crc: int, name: str, offset: int) -> dict[str, Any]:
        path = storage.join(self._folder.path, name)
        if _masked_crc(payload) != crc:
            raise _damaged(path, offset, "damaged record")
        try:
            example = decode_example(payload, self.features)
            return {key: decode_feature(feature, example[key]) for key, feature in self.features.items()}
        except KeyError as error:
            raise UserError(f"{path}: a record has no key {error}; build the dataset again") from error
        except (IndexError, ValueError) as error:
            raise _damaged(path, offset, f"unreadable record ({error})") from error

    @property
    def nbytes(self) -> int:
        """Size of all payloads."""
        return int(self._index[:, 0].sum(dtype=np.int64))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the lengths and checksums of all records in order: equal for equal content."""
        return hashlib.sha256(self._index.tobytes()).hexdigest()
