"""data_pipeline.inspect: counts of a dataset, and a page with windows drawn from it."""

import html
import json
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest

from configs import minimal
from data_pipeline import inspect
from subtractive_jax import records
from subtractive_jax.errors import UserError
from subtractive_jax.representation.audio import read_audio
from tests import synthetic

NOTE = "6 channels <mixed> down to one"


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory):
    data_dir = tmp_path_factory.mktemp("data")
    synthetic.write_windows(data_dir, minimal.get_config("autoencoder"), train=7, validation=3)
    folder = records.dataset_dir(data_dir, "windows")
    reasons = ("silent", "silent", "truncated")
    write_lines(folder / "rejected.jsonl", [dict(song_id=str(i), reason=why) for i, why in enumerate(reasons)])
    write_lines(folder / "notes.jsonl", [dict(song_id=f"song-{i}", note=NOTE) for i in (0, 1)])
    return data_dir


def run(*flags):
    command = [sys.executable, "-m", "data_pipeline.inspect", *flags]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)


def test_counts(data_dir):
    report = inspect.report(str(data_dir), "windows")
    lines = [line.strip() for line in report.splitlines()]
    assert lines[1].startswith("train: 7 examples of 7 songs, ")
    assert lines[2:9] == ["stem", "4  drums", "3  bass", "genre", "3  rock", "2  jazz", "2  reggae"]
    assert lines[9].startswith("validation: 3 examples of 3 songs, ")
    assert "test: 0 examples of 0 songs, 0.0 MB" in lines
    assert lines[-7:] == ["rejected: 3", "reason", "2  silent", "1  truncated", "noted: 2", "note", f"2  {NOTE}"]


def test_counts_that_the_build_has_made_need_no_record(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    folder = records.dataset_dir(tmp_path, "windows")
    metadata = json.loads((folder / "metadata.json").read_text())
    counted = dict(
        songs=dict(train=7, validation=3, test=0),
        counts=dict(train=dict(drums=4, bass=3), validation=dict(drums=2, bass=1), test={}),
        genres=dict(train=dict(rock=3, reggae=2, jazz=2), validation=dict(rock=1, reggae=1, jazz=1), test={}),
    )
    (folder / "metadata.json").write_text(json.dumps(metadata | counted))
    for shard in folder.glob("*.tfrecord-*"):
        content = bytearray(shard.read_bytes())
        content[20:40] = bytes(20)  # a record that cannot be read, but counted
        shard.write_bytes(content)
    ours, theirs = (inspect.report(str(place), "windows").splitlines()[1:] for place in (tmp_path, data_dir))
    assert ours == theirs


def test_the_page_plays_and_shows_windows(data_dir, tmp_path):
    path = inspect.write_page(str(data_dir), tmp_path / "page", count=4, seed=0)
    moved = shutil.move(path.parent, tmp_path / "elsewhere")  # nothing in it depends on where it lies
    text = (Path(moved) / "index.html").read_text()
    assert text.count("<article") == 4 and "4 of 10 windows" in text
    sources = re.findall(r'<audio [^>]*src="([^"]+)"', text)
    assert len(sources) == len(set(sources)) == 12 == text.count('<img src="data:image/webp;base64,')
    examples = [example for split in records.SPLITS for example in records.Split(data_dir, "windows", split)]
    titles = [html.unescape(title) for title in re.findall(r'<p class="job">(.*?)</p>', text)]
    for number, title in enumerate(titles):
        files = [Path(moved) / source for source in sources[3 * number : 3 * number + 3]]
        (shown,) = [example for example in examples if example["mix"] == files[0].read_bytes()]
        assert title == f"{shown['song_id']}, 0.00 s, {shown['stem_name']}"
        assert [file.read_bytes() for file in files] == [shown[signal] for signal in ("mix", "context", "stem")]
        assert all(read_audio(file)[1] == 16_000 for file in files)
        for told in (*shown["instructions"], shown["caption"]):
            assert html.escape(told) in text


def test_the_page_tells_what_was_unusual(data_dir, tmp_path):
    text = inspect.write_page(str(data_dir), tmp_path, count=10, seed=0).read_text()
    assert text.count(f'<p class="note">{html.escape(NOTE)}</p>') == 4  # of two songs with a window in each split


def test_the_sample_follows_the_seed(data_dir, tmp_path):
    def titles(seed, folder):
        text = inspect.write_page(str(data_dir), tmp_path / folder, count=4, seed=seed).read_text()
        return re.findall(r'<p class="job">(.*?)</p>', text)

    assert titles(0, "a") == titles(0, "b") and len(titles(0, "c")) == 4
    assert len({tuple(titles(seed, f"seed-{seed}")) for seed in range(5)}) > 1


def test_bleed_and_sets_of_stems_are_shown(tmp_path, monkeypatch):
    about = synthetic._about

    def separated(i, stem):
        example = about(i, "bass+drums")
        return example | dict(tags=json.dumps(json.loads(example["tags"]) | {"bleed_db": -23.5}))

    monkeypatch.setattr(synthetic, "_about", separated)
    synthetic.write_windows(tmp_path, minimal.get_config("autoencoder"), train=2, validation=0)
    text = inspect.write_page(str(tmp_path), tmp_path / "inspect", count=2, seed=0).read_text()
    assert text.count("<dt>Bleed (dB)</dt><dd>-23.5</dd>") == 2
    assert "2  bass+drums" in inspect.report(str(tmp_path), "windows")


def test_a_bucket(data_dir, tmp_path):
    url = f"memory://{uuid.uuid4()}"
    fs, root = fsspec.core.url_to_fs(url)
    fs.put(f"{data_dir}/windows", f"{root}/windows", recursive=True)
    assert inspect.report(url, "windows").splitlines()[1:] == inspect.report(str(data_dir), "windows").splitlines()[1:]
    inspect.write_page(url, tmp_path, count=1, seed=0)
    fs.rm(root, recursive=True)


def test_the_program(data_dir):
    done = run(f"--data_dir={data_dir}", "--examples=2")
    assert done.returncode == 0, done.stderr
    page = data_dir / "inspect" / "index.html"
    assert done.stdout.splitlines()[-1] == str(page) and page.read_text().count("<article") == 2


def test_bad_input_is_one_line(tmp_path):
    done = run(f"--data_dir={tmp_path}/none")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no dataset here" in done.stderr
    synthetic.write_windows(tmp_path, minimal.get_config("autoencoder"), train=0, validation=0)
    with pytest.raises(UserError, match="no window to show"):
        inspect.write_page(str(tmp_path), tmp_path / "page", count=3, seed=0)
