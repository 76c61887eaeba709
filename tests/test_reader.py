"""Training batches: the same from disk and from buckets, exactly resumable, every example once whatever the hosts."""

import subprocess
import sys
import uuid

import fsspec
import numpy as np
import pytest

from configs import minimal
from subtractive_jax import records, storage
from subtractive_jax.errors import UserError
from subtractive_jax.training import audio_stages, reader
from tests import synthetic
from tests.servers import bucket_server

_BATCH = 4


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory):
    data_dir = tmp_path_factory.mktemp("data")
    synthetic.write_windows(data_dir, minimal.get_config("autoencoder"), train=13, validation=5)
    return data_dir


def write_indexes(data_dir):
    """Writes every shard of `windows` again, with its index file."""
    for path in records.dataset_dir(data_dir, "windows").glob("*.tfrecord-*-of-?????"):
        payloads = synthetic.read_payloads(path)
        with open(path, "wb") as file:
            index = records.write_records(file, payloads)
        path.with_name(path.name + records.INDEX_SUFFIX).write_bytes(index)


def upload(data_dir, url: str) -> str:
    fs, root = fsspec.core.url_to_fs(url)
    fs.put(f"{data_dir}/windows", f"{root}/windows", recursive=True)
    return url


@pytest.fixture
def memory(local):
    url = upload(local, f"memory://{uuid.uuid4()}")
    yield url
    if fsspec.filesystem("memory").exists(url):
        fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.fixture(scope="module")
def s3(local):
    with bucket_server() as url:
        yield upload(local, url)


def batches(data_dir, rows=range(_BATCH), split="train"):
    config = minimal.get_config("autoencoder")
    examples = records.Split(data_dir, "windows", split, ("mix", "context", "stem", "gain"))
    source = audio_stages.AudioSource(examples, config.representation.sample_rate, 4000)
    return reader.Batches(source, _BATCH, seed=1, rows=np.array(rows))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_a_bucket_gives_the_batches_of_a_folder(local, place, request):
    url = request.getfixturevalue(place)
    ours, theirs = batches(url), batches(local)
    for one, other in zip(ours.stream(2, 6), theirs.stream(2, 6), strict=True):
        assert_equal(one, other)
    for split in records.SPLITS:
        one, other = (records.Split(place, "windows", split) for place in (url, local))
        assert one.fingerprint == other.fingerprint and list(one) == list(other)
    assert records.read_metadata(url, "windows") == records.read_metadata(local, "windows")


def test_a_bucket_that_is_not_there_or_not_readable(s3, monkeypatch):
    with pytest.raises(UserError, match='no dataset "windows" .s3://[^ ]*/nowhere/windows/1.0.0/metadata.json'):
        records.Split(s3.replace("some where", "nowhere"), "windows", "train")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="s3://.*not readable .*credentials"):
        records.Split(s3, "windows", "train")
    s3fs.S3FileSystem.clear_instance_cache()


def test_unknown_addresses():
    with pytest.raises(UserError, match="nosuch://place.*Protocol not known: nosuch"):
        records.read_metadata("nosuch://place", "windows")
    with pytest.raises(UserError, match="adl://place.*(install|package)"):
        records.read_metadata("adl://place", "windows")


def test_an_index_spares_the_scan(local, tmp_path, monkeypatch):
    synthetic.write_windows(tmp_path, minimal.get_config("autoencoder"), train=13, validation=5)
    write_indexes(tmp_path)
    opened = []
    monkeypatch.setattr(storage.Folder, "open", lambda self, name: opened.append(name))
    indexed = records.Split(tmp_path, "windows", "train")
    assert opened == []
    monkeypatch.undo()
    scanned = records.Split(local, "windows", "train")
    assert indexed.fingerprint == scanned.fingerprint and list(indexed) == list(scanned)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (records.INDEX_SUFFIX, lambda content: content[:-1], "of-00002.index: damaged index"),
        (records.INDEX_SUFFIX, lambda content: content[:14] + b"\xff" + content[15:], "of-00002.index: damaged index"),
        ("", lambda content: content[:-1], r"of-00002: \d+ bytes, but by its index \d+"),
        ("", lambda content: content[:-6] + b"\xff\x00\xff" + content[-3:], "of-00002: damaged record at byte"),
    ],
)
def test_damage_is_found_with_an_index_too(tmp_path, suffix, change, message):
    synthetic.write_windows(tmp_path, minimal.get_config("autoencoder"), train=13, validation=5)
    write_indexes(tmp_path)
    path = records.dataset_dir(tmp_path, "windows") / f"windows-train.tfrecord-00001-of-00002{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        list(records.Split(tmp_path, "windows", "train", ("song_id",)))
    assert "\n" not in str(error.value)


def test_files_still_open_at_exit_are_nobodys_concern(local):
    code = (
        "import sys; from subtractive_jax import storage; folder = storage.Folder(sys.argv[1])\n"
        "folder.read_ranges([('metadata.json', 0, 1)]); sys.modules['held'] = folder; storage.os = None"
    )
    folder = records.dataset_dir(local, "windows")
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_file_that_vanishes_while_training(memory):
    examples = records.Split(memory, "windows", "train")
    fsspec.filesystem("memory").rm(memory, recursive=True)
    with pytest.raises(UserError, match="memory://.*not readable .FileNotFoundError"):
        examples.read([0, 7, 3])


def test_hosts_together_read_the_dataset_exactly_once_an_epoch(local):
    class Recorded:
        fingerprint = ""

        def __init__(self):
            self.examples = records.Split(local, "windows", "train", ("song_id",))
            self.seen = []

        def __len__(self):
            return len(self.examples)

        def batch(self, examples, draws):
            found = self.examples.read(examples)
            self.seen += [example["song_id"] for example in found]
            return dict(number=np.asarray(examples))

    hosts = [Recorded() for _ in range(2)]
    rows = [np.arange(0, 2), np.arange(2, 4)]
    for host, own in zip(hosts, rows, strict=True):
        for _ in reader.Batches(host, _BATCH, seed=0, rows=own).stream(0, 13):  # 4 epochs of 13
            pass
    assert [len(host.seen) for host in hosts] == [26, 26]  # no host reads what another trains on
    songs = [song for host in hosts for song in host.seen]
    assert sorted(songs) == sorted(4 * [f"song-{i}" for i in range(13)])


def test_the_step_is_the_position(local):
    whole = list(batches(local).stream(0, 8))
    for start in (1, 3, 7):  # within an epoch of 13, and across its end
        for one, other in zip(batches(local).stream(start, 8), whole[start:], strict=True):
            assert_equal(one, other)


def test_evaluation_is_finite_masked_and_the_same_everywhere(local, memory):
    config = minimal.get_config("autoencoder")
    passes = []
    for place, hosts in ((local, [range(4)]), (memory, [range(2), range(2, 4)])):
        examples = records.Split(place, "windows", "validation", ("mix", "context", "stem", "gain"))
        source = audio_stages.AudioSource(examples, config.representation.sample_rate, 4000)
        parts = [list(reader.evaluation_batches(source, _BATCH, np.array(rows), 256)) for rows in hosts]
        assert {len(part) for part in parts} == {2}
        passes.append([{k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*parts, strict=True)])
    for one, other in zip(*passes, strict=True):
        assert_equal(one, other)
    assert [batch["valid"].tolist() for batch in passes[0]] == [[True] * 4, [True, False, False, False]]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 4096, 10_007])
def test_shuffling_is_a_permutation(size):
    order = reader.shuffled(np.arange(size), size, (3, 0))
    assert sorted(order.tolist()) == list(range(size))
    halves = [reader.shuffled(half, size, (3, 0)) for half in np.array_split(np.arange(size), 2)]
    assert np.concatenate(halves).tolist() == order.tolist()
    if size > 3:
        assert order.tolist() != reader.shuffled(np.arange(size), size, (3, 1)).tolist()


def test_shuffling_has_no_favourites():
    size, epochs = 10, 3000
    orders = np.stack([reader.shuffled(np.arange(size), size, (0, epoch)) for epoch in range(epochs)])
    counts = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    expected = epochs / size
    assert (
        np.square(counts - expected).sum() / expected < 130
    )  # chi-square with 81 degrees of freedom: mean 81, sd 12.7


def test_shuffling_takes_no_memory_to_speak_of():
    order = reader.shuffled(np.array([0, 1, 10**12 - 1]), 10**12, (0, 0))
    assert len(set(order.tolist())) == 3 and (order < 10**12).all() and (order >= 0).all()


def test_an_empty_split_is_refused(local):
    with pytest.raises(UserError, match="no example"):
        batches(local, split="test")
