"""Conversion: musicnn's checkpoint, a run to a model folder, and what is refused."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import minimal
from launch import convert
from subtractive_jax import parts
from subtractive_jax.weights import model_folder


def run(*arguments):
    command = [sys.executable, "-m", "launch.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_musicnn(tmp_path):
    output = tmp_path / "weights" / "musicnn.safetensors"
    done = run("--from=musicnn", f"--output={output}")
    assert done.returncode == 0, done.stderr
    tensors = safetensors.numpy.load_file(output)
    assert sum(tensor.size for tensor in tensors.values()) == 792_079
    assert tensors["conv2d_1/kernel"].shape == (7, 67, 1, 204) and tensors["dense_1/bias"].shape == (50,)
    again = run("--from=musicnn", f"--output={output}")
    assert again.returncode == 2 and "exists" in again.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model folder stands in for a run: `model_folder.load` reads both."""
    config = minimal.get_config("autoencoder")
    params = {"autoencoder": parts.network("autoencoder", config).init(jax.random.key(0))}
    path = tmp_path_factory.mktemp("convert") / "source"
    model_folder.save(path, model_folder.ModelFiles(config, params), "float32", card="a card")
    return path


def test_run_to_model_folder(tmp_path, source):
    output = tmp_path / "model"
    done = run("--from=run", f"--input={source}", f"--output={output}", "--dtype=float16")
    assert done.returncode == 0, done.stderr
    before, after = (model_folder.load(path).params["autoencoder"] for path in (source, output))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old.astype(np.float16).astype(np.float32), new)
    card = (output / "MODEL_CARD.md").read_text()
    assert card.startswith("# model\n") and "- `autoencoder`" in card


def test_a_given_card_is_kept(tmp_path, source):
    card = tmp_path / "card.md"
    card.write_text("Trained on silence.\n")
    done = run("--from=run", f"--input={source}", f"--output={tmp_path / 'model'}", f"--card={card}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "MODEL_CARD.md").read_text() == "Trained on silence.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from=runs"], 'did you mean "run"'),
        (["--from=run"], "--input=RUN"),
        (["--from=run", "--input={source}", "--output={source}"], "exists"),
        (["--from=run", "--input={source}/none", "--output={source}2"], "unknown model folder"),
        (["--from=musicnn", "--input={source}"], "no --input"),
    ],
)
def test_refused(source, arguments, message):
    done = run(*(argument.format(source=source) for argument in arguments))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_musicnn_is_only_read_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(convert.UserError, match="pip install --no-deps musicnn"):
        convert.read_musicnn()
