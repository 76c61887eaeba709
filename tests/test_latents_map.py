"""Maps of exported latents: what is alike lies close together, and the page says what is what."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def draw(*arguments):
    command = [sys.executable, "-m", "launch.latents_map", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def table(path, genres, count=12):
    """Windows whose embeddings lie around a place of their genre."""
    generator = np.random.default_rng(0)
    rows = []
    for place, genre in enumerate(genres):
        for index in range(count):
            embedding = generator.normal(scale=0.3, size=8)
            embedding[place % 8] += 5.0
            rows.append(
                {
                    "song_id": f"{genre}-{index // 4}",
                    "split": "train",
                    "start_seconds": 10.0 * index,
                    "stem": "drums",
                    "tags": json.dumps({"genre": genre, "bpm": 120.0} if genre else {}),
                    "instruction": f"Add <{genre}> drums",
                    "embedding": embedding.tolist(),
                    "latent": [0.0],
                }
            )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def groups(page):
    """Positions by colour."""
    layers = re.findall(r'<g id="group\d+" fill="(#\w+)">(.*?)</g>', page, re.DOTALL)
    return {color: np.array(re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', circles), float) for color, circles in layers}


@pytest.mark.parametrize("method", ["pca", pytest.param("umap", marks=pytest.mark.slow)])
def test_genres_lie_apart(tmp_path, method):
    if method == "umap":
        pytest.importorskip("umap")
    source = table(tmp_path / "latents.parquet", ["rock", "jazz", "dance"])
    done = draw(f"--input={source}", f"--output={tmp_path / 'map.html'}", f"--method={method}")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "map.html").read_text()
    clouds = list(groups(page).values())
    assert [len(cloud) for cloud in clouds] == [12, 12, 12]
    within = max(np.linalg.norm(cloud - cloud.mean(axis=0), axis=1).mean() for cloud in clouds)
    centres = [cloud.mean(axis=0) for cloud in clouds]
    assert min(np.linalg.norm(a - b) for a in centres for b in centres if a is not b) > 2 * within
    assert "rock-1 at 40.0 s, rock\nAdd &lt;rock&gt; drums" in page and "36 windows of 9 songs" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_rare_groups_share_a_colour(tmp_path):
    source = table(tmp_path / "latents.parquet", [f"genre {index}" for index in range(12)], count=3)
    done = draw(f"--input={source}", f"--output={tmp_path / 'map.html'}")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "map.html").read_text()
    assert len(groups(page)) == 9 and "other (12)" in page


def test_columns_and_missing_tags(tmp_path):
    source = table(tmp_path / "latents.parquet", ["rock", ""])
    assert draw(f"--input={source}", f"--output={tmp_path / 'a.html'}").returncode == 0
    assert "untagged (12)" in (tmp_path / "a.html").read_text()
    assert draw(f"--input={source}", f"--output={tmp_path / 'b.html'}", "--color_by=song_id").returncode == 0
    assert "rock-2 (4)" in (tmp_path / "b.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input={good}", "--output={good}"], "exists"),
        (["--input={good}", "--output={out}", "--method=tsne"], "pca"),
        (["--input={good}", "--output={out}", "--color_by=gerne"], 'did you mean "genre"'),
        (["--input={folder}/none", "--output={out}"], "not a table"),
        (["--input={folder}/text", "--output={out}"], "not a table"),
        (["--input={small}", "--output={out}"], "too few"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    good, small = table(tmp_path / "good.parquet", ["rock"]), table(tmp_path / "small.parquet", ["rock"], count=2)
    (tmp_path / "text").write_text("no table")
    filled = [each.format(good=good, small=small, folder=tmp_path, out=tmp_path / "out.html") for each in arguments]
    done = draw(*filled)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out.html").exists()
