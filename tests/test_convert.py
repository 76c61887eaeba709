"""The program launch.convert: its kinds, its flags, and what is refused. What the kinds do: tests/test_convert_*.py."""

import json
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


def converted(*arguments):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_published_weights_in_and_out(tmp_path):
    published = pytest.importorskip("tests.published")
    published.stable_diffusion(tmp_path / "riffusion-model-v1")
    config = tmp_path / "config.py"
    config.write_text("from tests import published\n\n\ndef get_config():\n    return published.config()\n")
    first, out, again = tmp_path / "first", tmp_path / "out", tmp_path / "again"
    published_folder = f"--input={tmp_path / 'riffusion-model-v1'}"
    converted("--from=riffusion", published_folder, f"--output={first}", f"--config={config}", "--widen")
    card = (first / "MODEL_CARD.md").read_text()
    assert "Converted from `riffusion-model-v1` (riffusion), whose licence still holds." in card
    assert converted("--to=diffusers", f"--input={first}", f"--output={out}") == {"to": "diffusers", "output": str(out)}
    converted("--from=instruct-pix2pix", f"--input={out}", f"--output={again}")
    assert weights(again) == weights(first) and weights(first).keys() == {
        f"{part}.safetensors" for part in ("text_encoder", "autoencoder", "base_denoiser", "denoiser")
    }
    assert (again / "config.json").read_text() == (first / "config.json").read_text()

    published.clip(published.clip_tokenizer(tmp_path / "clip")).save_pretrained(tmp_path / "clip")
    other = ["--from=clip-text", f"--input={tmp_path / 'clip'}", f"--into={first}", f"--output={tmp_path / 'other'}"]
    assert "train the base stage" in converted(*other)["note"]
    assert model_folder.load(tmp_path / "other").params["denoiser"]["condition_adapter"]


def test_the_shipped_model_out_and_in(tmp_path):
    pytest.importorskip("torch")
    converted("--to=diffusers", "--input=tiny", f"--output={tmp_path / 'out'}")
    converted("--from=instruct-pix2pix", f"--input={tmp_path / 'out'}", f"--output={tmp_path / 'back'}")
    before, after = model_folder.load("tiny"), model_folder.load(tmp_path / "back")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), before.params, after.params)
    for name in ("representation", "data", "text_encoder", "denoiser", "schedule", "target", "context_scale"):
        assert before.config[name] == after.config[name]

    (tmp_path / "out" / "subtractive_jax.json").write_text("{}")
    done = run("--from=instruct-pix2pix", f"--input={tmp_path / 'out'}", f"--output={tmp_path / 'third'}")
    assert done.returncode == 2 and "subtractive_jax.json: the fields " in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from=runs"], 'did you mean "run"'),
        ([], "give either --from=KIND or --to=diffusers"),
        (["--from=run", "--to=diffusers"], "give either"),
        (["--to=difusers"], 'did you mean "diffusers"'),
        (["--to=diffusers", "--input={source}"], "--to=diffusers needs --input"),
        (["--to=diffusers", "--input={source}", "--output={source}2"], "the model lacks: text_encoder, base_denoiser"),
        (["--from=run"], "--from=run needs --input"),
        (["--from=run", "--input={source}", "--output={source}"], "exists"),
        (["--from=run", "--input={source}/none", "--output={source}2"], "unknown model folder"),
        (["--from=run", "--input={source}", "--output={source}2", "--widen"], "--from=run takes no --widen"),
        (["--from=musicnn", "--card=card.md"], "--from=musicnn takes no --card"),
        (["--to=diffusers", "--dtype=float16"], "--to=diffusers takes no --dtype"),
        (["--from=t5", "--input={source}", "--output={source}2"], "name the model to copy with --into=MODEL"),
        (["--from=hifigan", "--config=configs/tiny.py"], "--from=hifigan takes no --config"),
        (["--from=riffusion", "--input={source}/none", "--output={source}2"], "no such folder"),
        (["--from=riffusion", "--input={source}", "--output={source}2"], "unet/config.json: missing"),
        (["--from=musicnn", "--input={source}"], "no --input"),
    ],
)
def test_refused(source, arguments, message):
    done = run(*(argument.format(source=source) for argument in arguments))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_musicnn_is_only_read_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(convert.UserError, match="pip install --no-deps musicnn"):
        convert.read_musicnn()
