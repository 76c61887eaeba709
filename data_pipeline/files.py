"""Files wherever Beam has a file system: local, `gs://`, `s3://`, `hdfs://`. All of the pipeline goes through here."""

import functools
import os
import re
import tempfile
from pathlib import Path
from typing import BinaryIO

from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from subtractive_jax.errors import UserError

join = FileSystems.join


def is_local(path: str) -> bool:
    return FileSystems.get_scheme(path) is None


def absolute(path: str) -> str:
    """The path for workers that run in other folders; what is no local path stays as it is."""
    return os.path.abspath(path) if is_local(path) else path


def name(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def open_file(path: str) -> BinaryIO:
    """The file's bytes, seekable.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    try:
        return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)
    except (BeamIOError, OSError) as error:
        raise UserError(f"{path}: not readable ({error})") from error


def read_bytes(path: str) -> bytes:
    with open_file(path) as file:
        return file.read()


def read_text(path: str) -> str:
    return read_bytes(path).decode()


def create(path: str) -> BinaryIO:
    return FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED)


def write_bytes(path: str, content: bytes) -> None:
    with create(path) as file:
        file.write(content)


def exists(path: str) -> bool:
    """Whether there is such a file, or such a folder; where a store knows no folders, one with a file in it."""
    return FileSystems.exists(path) or (not _has_folders(path) and bool(list_files(path)))


def size(path: str) -> int:
    """In bytes."""
    return FileSystems.get_filesystem(path).size(path)


def list_files(folder: str) -> dict[str, int]:
    """Every file under a folder, at any depth: path relative to it -> size in bytes, sorted."""
    prefix = join(folder, "")
    pattern = re.sub(r"[*?\[]", r"[\g<0>]", prefix) + "**"  # Beam's patterns have no other way to quote
    found = {
        entry.path.removeprefix(prefix): entry.size_in_bytes for entry in FileSystems.match([pattern])[0].metadata_list
    }
    return dict(sorted(found.items()))


def move(pairs: list[tuple[str, str]]) -> None:
    """Renames files in order, each to its pair."""
    FileSystems.rename([source for source, _ in pairs], [target for _, target in pairs])


def move_folder(source: str, target: str, last: str) -> None:
    """Renames a folder: at once, or file by file, the file `last` after all others, on a store that knows no folders.

    Raises:
      UserError: the target is there already.
    """
    if exists(join(target, last)):
        raise UserError(f"{target}: already there; delete it, or give another folder")
    if _has_folders(source):
        try:
            move([(source, target)])
        except BeamIOError as error:
            raise UserError(f"{target}: already there, and not empty; delete it, or give another folder") from error
    else:
        delete_folder(target)  # what a killed program had moved there
        names = sorted(list_files(source), key=lambda name: (name == last, name))
        move([(join(source, name), join(target, name)) for name in names])


def _has_folders(path: str) -> bool:
    return FileSystems.get_filesystem(path).has_dirs()


def delete(paths: list[str]) -> None:
    FileSystems.delete(paths)


def delete_folder(folder: str) -> None:
    if _has_folders(folder):
        if exists(folder):
            FileSystems.delete([folder])
    elif paths := [join(folder, path) for path in list_files(folder)]:
        FileSystems.delete(paths)


def make_folder(folder: str) -> None:
    """Makes a folder that is not there yet, where the file system knows folders."""
    if not exists(folder):
        FileSystems.mkdirs(folder)


@functools.cache
def local_copy(folder: str) -> str:
    """The folder itself where it is local, or else a copy in a temporary folder, made once a process."""
    if is_local(folder):
        return folder
    copy = tempfile.mkdtemp(prefix="subtractive-jax-")
    for path in list_files(folder):
        target = Path(copy, path)
        if not target.resolve().is_relative_to(Path(copy).resolve()):
            raise UserError(f"{folder}: the path {path} leads out of the folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(join(folder, path)))
    return copy
