"""Files on disks and in buckets, `gs://` and `s3://`, as Beam knows them. All of the pipeline goes through here.

Where a path is at fault, such as a missing file, the error is a UserError; faults of machines and networks, such as a
full disk, stay what they are, so that a runner tries again.
"""

import atexit
import contextlib
import errno
import heapq
import importlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from apache_beam.io.filesystem import CompressionTypes, FileSystem
from apache_beam.io.filesystems import FileSystems

from data_pipeline.once import once
from subtractive_jax.errors import UserError

_CLIENTS = {"gs": ("apache_beam.io.gcp.gcsfilesystem", "gcp"), "s3": ("boto3", "aws")}  # and the extra that brings it
_BUCKET = re.compile(r"\w+://[A-Za-z0-9._-]+(/|$)")
_PATH_ERRORS = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
}
_PATH_STATUS = {401, 403, 404}  # of HTTP


def is_local(path: str) -> bool:
    return FileSystems.get_scheme(path) is None


def _file_system(path: str) -> FileSystem:
    scheme = FileSystems.get_scheme(path)
    if scheme is not None:
        if scheme not in _CLIENTS:
            raise UserError(f"{path}: no storage is known as {scheme}://; give a local path, gs://... or s3://...")
        if not _BUCKET.match(path):
            raise UserError(f"{path}: this names no bucket; give {scheme}://BUCKET/FOLDER")
        client, extra = _CLIENTS[scheme]
        try:
            importlib.import_module(client)
        except ImportError as error:
            needed = f"pip install 'apache-beam[{extra}]', here and where workers run"
            raise UserError(f"{path}: {scheme}:// needs Beam's extra {extra} ({error}); {needed}") from error
    return FileSystems.get_filesystem(path)


def _cause(error: BaseException) -> BaseException:
    """What lies beneath the errors that Beam wraps around one another."""
    beneath = [*(getattr(error, "exception_details", None) or {}).values(), *error.args]
    return next((_cause(inner) for inner in beneath if isinstance(inner, BaseException)), error)


def _reason(error: BaseException) -> str:
    error = _cause(error)
    return " ".join(str(getattr(error, "strerror", None) or getattr(error, "message", None) or error).split())


@contextlib.contextmanager
def _to_be(done: str, path: str) -> Iterator[None]:
    """Raises UserError, that the path cannot be `done`, where the path is at fault."""
    try:
        yield
    except Exception as error:  # clients of cloud storage have exceptions of their own
        cause = _cause(error)
        is_path_error = isinstance(cause, ValueError) or getattr(cause, "errno", None) in _PATH_ERRORS
        if is_path_error or getattr(cause, "code", None) in _PATH_STATUS:
            raise UserError(f"{path}: cannot be {done} ({_reason(error)})") from error
        raise


def join(folder: str, *names: str) -> str:
    return _file_system(folder).join(folder, *names)


def absolute(path: str) -> str:
    """The path for workers that run in other folders; what is no local path stays as it is."""
    return os.path.abspath(path) if is_local(path) else path


def name(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def open_file(path: str) -> BinaryIO:
    """The file's bytes, seekable.

    Raises:
      UserError: there is no such file, or it may not be read.
    """
    with _to_be("read", path):
        if is_local(path) and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise UserError(f"{path}: not a file")
        return _file_system(path).open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def read_bytes(path: str) -> bytes:
    with _to_be("read", path), open_file(path) as file:
        return file.read()


def read_text(path: str) -> str:
    return read_bytes(path).decode()


def create(path: str) -> BinaryIO:
    """A new file to be written, in folders that are made for it.

    Raises:
      UserError: it may not be written there.
    """
    with _to_be("written", path):
        return _file_system(path).create(path, compression_type=CompressionTypes.UNCOMPRESSED)


def write_bytes(path: str, content: bytes) -> None:
    with _to_be("written", path), create(path) as file:
        file.write(content)


def exists(path: str) -> bool:
    """Whether there is such a file, or such a folder; where a store knows no folders, one with a file in it."""
    file_system = _file_system(path)
    with _to_be("read", path):
        if is_local(path):
            return file_system.exists(path)
        is_bucket = not path.partition("://")[2].partition("/")[2]
        return (not is_bucket and file_system.exists(path)) or bool(list_files(path))


def size(path: str) -> int:
    """In bytes."""
    with _to_be("read", path):
        return _file_system(path).size(path)


def list_files(folder: str) -> dict[str, int]:
    """Every file under a folder, at any depth: path relative to it -> size in bytes, sorted; none in no folder.

    Links are followed; a folder that several lead to is listed once, under its own path if that is in the folder.

    Raises:
      UserError: it is no folder, a link leads nowhere, or something is not readable or neither file nor folder.
    """
    with _to_be("read", folder):
        if is_local(folder):
            found = dict(_local_files(folder))
        else:
            prefix = join(folder, "")
            pattern = re.split(r"[*?\[]", prefix)[0] + "**"  # Beam has no way to quote these
            (matched,) = _file_system(folder).match([pattern])
            entries = [entry for entry in matched.metadata_list if entry.path.startswith(prefix)]
            found = {entry.path.removeprefix(prefix): entry.size_in_bytes for entry in entries}
    return dict(sorted(found.items()))


def _local_files(folder: str) -> Iterator[tuple[str, int]]:
    seen: set[tuple[int, int]] = set()
    waiting = [(False, "")]  # links last
    while waiting:
        _, path = heapq.heappop(waiting)
        here = os.path.join(folder, path) if path else folder
        with _unless_gone(here):
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
            for entry in listed:
                inner = os.path.join(path, entry.name)
                with _unless_gone(entry.path):
                    status = entry.stat()
                    if stat.S_ISDIR(status.st_mode):
                        heapq.heappush(waiting, (entry.is_symlink(), inner))
                    elif stat.S_ISREG(status.st_mode):
                        yield inner, status.st_size
                    else:
                        raise UserError(f"{entry.path}: neither a file nor a folder; remove it")


@contextlib.contextmanager
def _unless_gone(path: str) -> Iterator[None]:
    """Passes over what others delete meanwhile."""
    try:
        with _to_be("read", path):
            yield
    except UserError:
        if os.path.lexists(path):
            raise


def move(pairs: list[tuple[str, str]]) -> None:
    """Renames files in order, each to its pair."""
    _file_system(pairs[0][0]).rename([source for source, _ in pairs], [target for _, target in pairs])


def move_folder(source: str, target: str, last: str) -> None:
    """Renames a folder: at once, or on a store without folders by copying its files, `last` after all others.

    Raises:
      UserError: the target is there already or cannot be written. It then lacks `last`, or is another's, and `source`
        holds all that it held.
    """
    try:
        if exists(join(target, last)):
            raise UserError("already there")
        if is_local(source):
            move([(source, target)])
        else:
            delete_folder(target)  # what a killed program had copied there
            names = list_files(source)
            _copy(source, target, [name for name in names if name != last])
            _copy(source, target, [last])
    except Exception as error:  # clients of cloud storage have exceptions of their own
        raise UserError(
            f"{target}: not written ({_reason(error)}); all is in {source}: move it, {last} last"
        ) from error
    if not is_local(source):
        delete_folder(source)


def _copy(source: str, target: str, names: Collection[str]) -> None:
    _file_system(source).copy([join(source, name) for name in names], [join(target, name) for name in names])
    sizes, copied = list_files(source), list_files(target)
    if failed := [name for name in names if copied.get(name) != sizes[name]]:  # Beam does not tell those on S3
        raise OSError(f"{len(failed)} of {len(names)} files could not be copied, such as {failed[0]}")


def delete(paths: list[str]) -> None:
    for path in filter(is_local, paths):  # Beam takes them for patterns
        os.remove(path)
    FileSystems.delete([path for path in paths if not is_local(path)])


def delete_folder(folder: str) -> None:
    """Deletes a folder and all that is in it, if it is there."""
    if not is_local(folder):
        delete([join(folder, path) for path in list_files(folder)])
    elif exists(folder):
        shutil.rmtree(folder)


def make_folder(folder: str) -> None:
    """Makes a folder that is not there yet, where the file system knows folders.

    Raises:
      UserError: it may not be written there.
    """
    if not exists(folder):
        with _to_be("made", folder):
            _file_system(folder).mkdirs(folder)


@once
def local_copy(folder: str) -> str:
    """The folder itself where it is local, or else a copy in a temporary folder, made once a process."""
    if is_local(folder):
        return folder
    with contextlib.ExitStack() as temporary:
        copy = temporary.enter_context(tempfile.TemporaryDirectory(prefix="subtractive-jax-"))
        for path in list_files(folder):
            target = Path(copy, path)
            if not target.resolve().is_relative_to(Path(copy).resolve()):
                raise UserError(f"{folder}: the path {path} leads out of the folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_file(join(folder, path)) as file, target.open("wb") as copied:
                shutil.copyfileobj(file, copied, 1 << 20)
        atexit.register(temporary.pop_all().close)
    return copy
