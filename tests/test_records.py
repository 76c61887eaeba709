"""The TensorFlow-free reader against TensorFlow, and against damage."""

import numpy as np
import pytest

from configs import minimal
from subtractive_jax import records
from subtractive_jax.errors import UserError
from tests import synthetic


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory):
    data_dir = tmp_path_factory.mktemp("data")
    synthetic.write_windows(data_dir, minimal.get_config("autoencoder"), train=5, validation=0)
    return data_dir


def test_decodes_what_tensorflow_encodes(tmp_path):
    tf = pytest.importorskip("tensorflow")
    values = dict(
        text=tf.train.Feature(bytes_list=tf.train.BytesList(value=["schön".encode(), b"", b"\x00" * 300])),
        ints=tf.train.Feature(int64_list=tf.train.Int64List(value=[0, -1, 2**63 - 1, -(2**63), 300])),
        floats=tf.train.Feature(float_list=tf.train.FloatList(value=[0.0, -1.5, 1e-30])),
        empty=tf.train.Feature(bytes_list=tf.train.BytesList(value=[])),
        unset=tf.train.Feature(),
    )
    example = tf.train.Example(features=tf.train.Features(feature=values))
    path = tmp_path / "x.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for _ in range(3):
            writer.write(example.SerializeToString())
    payloads = synthetic.read_payloads(path)
    assert len(payloads) == 3
    decoded = records.decode_example(payloads[2])
    assert decoded["text"] == ["schön".encode(), b"", b"\x00" * 300]
    assert decoded["ints"].tolist() == [0, -1, 2**63 - 1, -(2**63), 300]
    assert decoded["floats"].dtype == np.float32 and decoded["floats"].tolist() == [0.0, -1.5, np.float32(1e-30)]
    assert len(decoded["empty"]) == 0 and len(decoded["unset"]) == 0


def test_tensorflow_reads_what_the_tests_write(tmp_path):
    tf = pytest.importorskip("tensorflow")
    payload = synthetic.encode_example(dict(a=[b"x", b""], b=[3, -4], c=[0.5]))
    path = tmp_path / "x.tfrecord"
    path.write_bytes(records.frame(payload) * 2)
    read = [item.numpy() for item in tf.data.TFRecordDataset(str(path))]
    assert read == [payload, payload]
    features = tf.train.Example.FromString(read[0]).features.feature
    assert list(features["a"].bytes_list.value) == [b"x", b""]
    assert list(features["b"].int64_list.value) == [3, -4]
    assert list(features["c"].float_list.value) == [0.5]


def test_unpacked_lists():
    unpacked = b"\x08\x05\x08\x07"  # int64_list { value: 5 value: 7 }, one field each, as old writers do
    feature = b"\x1a" + bytes([len(unpacked)]) + unpacked
    entry = b"\x0a\x01k\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    assert records.decode_example(b"\x0a" + bytes([len(features)]) + features)["k"].tolist() == [5, 7]


def test_split_is_random_access(windows):
    split = records.Split(windows, "windows", "train", ("song_id", "sample_rate", "instructions", "gain"))
    assert sorted(split[i]["song_id"] for i in range(len(split))) == [f"song-{i}" for i in range(5)]
    assert set(split[3]) == {"song_id", "sample_rate", "instructions", "gain"}
    assert split[0]["sample_rate"] == 16_000 and split[0]["gain"] == 1.0
    assert split[0]["instructions"] == ["Add rock drums", "Put in drums for a rock song 0"]
    assert len(records.Split(windows, "windows", "test")) == 0


def _copy(windows, tmp_path, change):
    for path in records.dataset_dir(windows, "windows").iterdir():
        target = records.dataset_dir(tmp_path, "windows") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(change(path.read_bytes()) if "train.tfrecord-00001" in path.name else path.read_bytes())


def test_fingerprint_follows_content(windows, tmp_path):
    def last_first(content: bytes) -> bytes:
        path = records.dataset_dir(windows, "windows") / "windows-train.tfrecord-00001-of-00002"
        last = records.frame(synthetic.read_payloads(path)[-1])
        return last + content[: -len(last)]

    _copy(windows, tmp_path / "same", lambda content: content)
    _copy(windows, tmp_path / "reordered", last_first)
    one, same, reordered = (
        records.Split(path, "windows", "train").fingerprint
        for path in (windows, tmp_path / "same", tmp_path / "reordered")
    )
    assert one == same != reordered


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "truncated record at byte"),
        (lambda content: content[:-6] + b"\xff\x00\xff" + content[-3:], "damaged record at byte"),
        (lambda content: b"\x01" + content[1:], "damaged record length at byte 0"),
        (lambda content: records.frame(b"\xff\xff"), "unreadable record"),
        (lambda content: records.frame(synthetic.encode_example(dict(mix=[b""]))), "has no key"),
    ],
)
def test_damage_is_named_with_file_and_place(windows, tmp_path, change, message):
    _copy(windows, tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        split = records.Split(tmp_path, "windows", "train", ("song_id",))
        for i in range(len(split)):
            split[i]
    assert "windows-train.tfrecord-00001-of-00002" in str(error.value)


def test_missing_shard_and_missing_dataset(windows, tmp_path):
    _copy(windows, tmp_path, lambda content: content)
    (records.dataset_dir(tmp_path, "windows") / "windows-train.tfrecord-00000-of-00002").unlink()
    with pytest.raises(UserError, match="one of 2 shards, but 1 are there"):
        records.Split(tmp_path, "windows", "train")
    with pytest.raises(UserError, match='no dataset "latents"'):
        records.Split(tmp_path, "latents", "train")
