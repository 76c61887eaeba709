"""Folders to read from: local ones and, through fsspec, those of cloud buckets (`gs://`, `s3://`, ...)."""

import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from subtractive_jax.errors import UserError

Range = tuple[str, int, int]  # file name, first byte, byte after the last
_OPEN_FILES = 256  # descriptors that a folder holds; operating systems allow 1024 or more
_REQUEST = 8 << 20  # bytes; neighbouring ranges of a remote file are fetched together up to this size
_GAP = 4 << 10  # bytes between ranges that are still neighbours
_BLOCK = 4 << 20  # bytes read ahead in a remote file that is opened


def is_remote(path: str) -> bool:
    return "://" in path


def join(folder: str, *names: str) -> str:
    return "/".join((folder.rstrip("/"), *names)) if is_remote(folder) else os.path.join(folder, *names)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path}: {error}") from error  # fsspec's own words: which package to install
    except Exception as error:  # every file system and its client raise classes of their own
        advice = "; check the address, and the credentials in its client's environment" if is_remote(path) else ""
        raise UserError(f"{path}: not readable ({type(error).__name__}: {error}){advice}") from error


class _LocalFile:
    """An open file that is closed when nobody holds it: evicted from a cache, it still serves the threads that read."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor).atexit = False  # threads may still read

    def expect(self, start: int, stop: int) -> None:
        """Lets the disk begin with a range that will be read; it serves many at once faster than one after another."""
        if sys.platform == "linux":
            os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._descriptor, stop - start, start)


class Folder:
    """The files of one folder. Threads may share it.

    Args:
      path: a local path, or a URL of any protocol whose fsspec package is installed. Credentials come from where the
        protocol's own tools look for them.

    Raises:
      UserError: the protocol is unknown or its package is not installed; and from every method, a file or folder that
        cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with _reading(path):
            found: tuple[fsspec.AbstractFileSystem, str] = (
                fsspec.core.url_to_fs(path) if is_remote(path) else (LocalFileSystem(), path)
            )
        self._fs, self._root = found
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._open = functools.lru_cache(_OPEN_FILES)(_LocalFile)

    def sizes(self) -> dict[str, int]:
        """Name -> size in bytes of the files in the folder, sorted; empty if there is no such folder."""
        with _reading(self.path), contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._root, detail=True)
            files = ((entry["name"].rpartition("/")[2], entry["size"]) for entry in entries if entry["type"] == "file")
            return dict(sorted(files))
        return {}

    def read(self, name: str) -> bytes:
        """A whole file."""
        with _reading(join(self.path, name)):
            return self._fs.cat_file(join(self._root, name))

    def open(self, name: str) -> BinaryIO:
        """A file to be read from front to back, with leaps."""
        options = {} if self._is_local else dict(block_size=_BLOCK, cache_type="readahead")
        with _reading(join(self.path, name)):
            return self._fs.open(join(self._root, name), "rb", **options)

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; fewer where a file ends before it. Remote files are read in parallel."""
        with _reading(self.path):
            return self._read_local(ranges) if self._is_local else self._read_remote(ranges)

    def _read_local(self, ranges: Sequence[Range]) -> list[bytes]:
        files = [self._open(join(self._root, name)) for name, _, _ in ranges]
        for file, (_, start, stop) in zip(files, ranges, strict=True):
            file.expect(start, stop)
        return [file.read(start, stop) for file, (_, start, stop) in zip(files, ranges, strict=True)]

    def _read_remote(self, ranges: Sequence[Range]) -> list[bytes]:
        requests: list[Range] = []
        places = []
        for name, start, stop in ranges:
            if requests:
                last, first, end = requests[-1]
                if name == last and 0 <= start - end <= _GAP and stop - first <= _REQUEST:
                    requests[-1] = (name, first, stop)
                    places.append((len(requests) - 1, start - first, stop - first))
                    continue
            requests.append((name, start, stop))
            places.append((len(requests) - 1, 0, stop - start))
        names, starts, stops = ([request[i] for request in requests] for i in range(3))
        paths = [join(self._root, str(name)) for name in names]
        pieces = self._fs.cat_ranges(paths, starts, stops, on_error="raise")
        return [bytes(pieces[i][start:stop]) for i, start, stop in places]
