"""Files: whose fault an error is, what a listing holds, and folders that move as a whole or not at all."""

import os
import resource
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipeline import files
from data_pipeline.once import once
from subtractive_jax.errors import UserError
from tests.servers import bucket_server


@pytest.fixture(scope="module")
def bucket():
    with bucket_server() as url:
        FileSystems.set_options(PipelineOptions([]))
        yield url


def freeze(url: str) -> None:
    """Lets the store refuse to copy a file: it then lies in an archive."""
    import boto3

    name, _, key = url.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=name, Key=key, Body=b"frozen", StorageClass="GLACIER")


def one_line(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("use", [files.exists, files.list_files, files.open_file, files.create, files.join])
def test_addresses_that_name_no_store(use):
    assert "foo://place/x: no storage is known as foo://" in one_line(use, "foo://place/x")
    assert "s3://: this names no bucket" in one_line(use, "s3://")
    assert "s3://my bucket/x: this names no bucket" in one_line(use, "s3://my bucket/x")


def test_a_store_whose_client_is_not_installed():
    code = (
        "import sys; sys.modules['boto3'] = sys.modules['google.cloud.storage'] = None\n"
        "from data_pipeline import files\n"
        "from subtractive_jax.errors import UserError\n"
        "for path in ('s3://bucket/x', 'gs://bucket/x'):\n"
        "    try: files.exists(path)\n"
        "    except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("s3://bucket/x: s3:// needs Beam's extra aws") and "apache-beam[aws]" in first
    assert second.startswith("gs://bucket/x: gs:// needs Beam's extra gcp") and "apache-beam[gcp]" in second


def test_paths_at_fault(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    assert "missing: cannot be read (No such file" in one_line(files.open_file, str(tmp_path / "missing"))
    assert "not a file" in one_line(files.open_file, str(tmp_path))
    assert "pipe: not a file" in one_line(files.open_file, str(tmp_path / "pipe"))
    assert "(Not a directory)" in one_line(files.open_file, str(tmp_path / "file" / "x"))
    assert "file: cannot be read (Not a directory)" in one_line(files.list_files, str(tmp_path / "file"))
    assert "cannot be written" in one_line(files.write_bytes, str(tmp_path / "file" / "x"), b"")
    assert "cannot be made (Not a directory)" in one_line(files.make_folder, str(tmp_path / "file" / "x"))


def test_paths_at_fault_in_a_bucket(bucket):
    assert "x: cannot be read (Not found" in one_line(files.open_file, f"{bucket}/x")
    assert "x: cannot be read (" in one_line(files.size, f"{bucket}/x")
    assert "NoSuchBucket" in one_line(files.write_bytes, "s3://nowhere/x", b"x")
    assert not files.exists("s3://nowhere") and not files.exists(f"{bucket}/x")


def test_a_machine_at_fault_is_no_bad_input(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"x")
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left"):
            files.write_bytes("/dev/full", b"x")
    held, limit = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 1, limit[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(files.open_file(str(path)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for file in held:
            file.close()


def test_a_listing_follows_links_once_and_without_end(tmp_path):
    folder, elsewhere = tmp_path / "songs", tmp_path / "elsewhere"
    for path in (folder / "b" / "real.wav", elsewhere / "far.wav"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"1234")
    (folder / "a").symlink_to(folder / "b")
    (folder / "b" / "up").symlink_to(folder)
    (folder / "c").symlink_to(elsewhere)
    (folder / "d").symlink_to(elsewhere)
    (folder / "file.wav").symlink_to(elsewhere / "far.wav")
    expected = {"b/real.wav": 4, "c/far.wav": 4, "file.wav": 4}
    assert files.list_files(str(folder)) == expected and list(files.list_files(str(folder))) == list(expected)
    assert files.list_files(str(folder / "a")) == {"real.wav": 4, "up/c/far.wav": 4, "up/file.wav": 4}
    assert files.list_files(str(tmp_path / "nothing")) == {}


def test_a_listing_passes_over_nothing_in_silence(tmp_path):
    (tmp_path / "lost.wav").symlink_to(tmp_path / "nowhere")
    assert "lost.wav: cannot be read (No such file" in one_line(files.list_files, str(tmp_path))
    (tmp_path / "lost.wav").unlink()
    os.mkfifo(tmp_path / "pipe.wav")
    assert "pipe.wav: neither a file nor a folder" in one_line(files.list_files, str(tmp_path))


def test_a_folder_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder, "songs", "locked")
        locked.mkdir(parents=True)
        locked.chmod(0)
        Path(folder).chmod(0o755)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            message = one_line(files.list_files, str(locked.parent))
            unwritable = one_line(files.create, f"{locked}/x")
        finally:
            if is_root:
                os.seteuid(0)
            locked.chmod(stat.S_IRWXU)
    assert "locked: cannot be read (Permission denied)" in message
    assert "cannot be written (Permission denied)" in unwritable


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_names_that_are_patterns_elsewhere(tmp_path, bucket, place):
    folder = f"{tmp_path if place == 'disk' else bucket}/a[[1]*?"
    names = ["[x]/song.wav", "song*.wav"]
    for name in names:
        files.write_bytes(files.join(folder, name), b"1")
    files.write_bytes(f"{folder[:-1]}!/other", b"1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert list(files.list_files(folder)) == names
    files.delete([files.join(folder, names[1])])
    assert list(files.list_files(folder)) == names[:1]
    files.delete_folder(folder)
    assert not files.exists(folder) and files.exists(f"{folder[:-1]}!")


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_folder_moves(tmp_path, bucket, place):
    root = str(tmp_path) if place == "disk" else bucket
    source, target = files.join(root, "staging"), files.join(root, "moved", "1.0.0")
    if place == "disk":
        (tmp_path / "moved").mkdir()
    for name in ("a", "b/c", "last"):
        files.write_bytes(files.join(source, name), name.encode())
    if place == "bucket":
        files.write_bytes(files.join(target, "left"), b"by a killed program")
    files.move_folder(source, target, "last")
    assert list(files.list_files(target)) == ["a", "b/c", "last"] and not files.exists(source)
    files.write_bytes(files.join(source, "last"), b"another")
    message = one_line(files.move_folder, source, target, "last")
    assert message == f"{target}: not written (already there); all is in {source}: move it, last last"
    assert list(files.list_files(source)) == ["last"]
    files.delete_folder(target), files.delete_folder(source)


def test_a_folder_that_moves_half_way_is_not_there_and_nothing_is_lost(bucket):
    source, target = f"{bucket}/half/staging", f"{bucket}/half/1.0.0"
    for name in ("a", "c", "last"):
        files.write_bytes(files.join(source, name), b"whole")
    freeze(f"{source}/b")
    message = one_line(files.move_folder, source, target, "last")
    assert "1 of 3 files could not be copied, such as b" in message and f"all is in {source}" in message
    assert not files.exists(f"{target}/last")
    assert list(files.list_files(source)) == ["a", "b", "c", "last"]


def test_a_folder_that_cannot_move_on_a_disk(tmp_path):
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "last").write_bytes(b"")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_bytes(b"")
    assert "not empty" in one_line(files.move_folder, f"{tmp_path}/staging", f"{tmp_path}/taken", "last")
    assert (tmp_path / "staging" / "last").exists()


def test_a_copy_of_a_bucket_is_made_once_and_goes_with_the_process(bucket):
    files.write_bytes(f"{bucket}/model/part/weights", b"1" * 100)
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor\n"
        "from apache_beam.io.filesystems import FileSystems\n"
        "from apache_beam.options.pipeline_options import PipelineOptions\n"
        "from data_pipeline import files\n"
        "FileSystems.set_options(PipelineOptions([]))\n"
        "with ThreadPoolExecutor(4) as pool: copies = set(pool.map(files.local_copy, 4 * [sys.argv[1]]))\n"
        "(copy,) = copies\n"
        "print(copy, files.list_files(copy))"
    )
    done = subprocess.run([sys.executable, "-c", code, f"{bucket}/model"], capture_output=True, text=True, check=True)
    copy, _, listed = done.stdout.strip().partition(" ")
    assert listed == "{'part/weights': 100}" and not Path(copy).exists()


def test_once_calls_once_whatever_the_threads():
    calls, started = [], threading.Barrier(4)

    @once
    def load(name: str) -> object:
        calls.append(name)
        time.sleep(0.05)
        if len(calls) == 1:
            raise ValueError
        return object()

    def ask(name):
        started.wait()
        return load(name)

    with pytest.raises(ValueError):
        load("a")
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, ["a"] * 4))) == 1
    assert calls == ["a", "a"] and load.__name__ == "load"
