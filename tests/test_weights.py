"""Parameters to files and back: PyTorch layout, model folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from configs import minimal
from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.fingerprint import params_hash
from subtractive_jax.weights import model_folder
from subtractive_jax.weights.torch_layout import from_torch, to_torch


@pytest.fixture(scope="module")
def files():
    """Two parts with values that eight bits of mantissa hold, so that every storage type can keep them."""
    config = minimal.get_config()
    params = {
        part: jax.jit(parts.network(part, config).init)(jax.random.key(0)) for part in ("text_encoder", "vocoder")
    }
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float16).astype(jnp.float32), params)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"drums": 0, "add": 1}, unk_token="drums"))
    return model_folder.ModelFiles(config, params, tokenizer)


def _assert_equal_trees(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), ours, theirs)


@pytest.mark.parametrize("part", parts.PARTS)
def test_torch_layout_round_trip(part):
    network = parts.network(part, minimal.get_config())
    params = jax.jit(network.init)(jax.random.key(1))
    tensors = to_torch(params)
    assert len(tensors) == len(jax.tree.leaves(params))
    _assert_equal_trees(from_torch(tensors, network.shapes()), params)


def test_torch_layout_names_every_mismatch(files):
    shapes = parts.network("vocoder", files.config).shapes()
    tensors = to_torch(files.params["vocoder"])
    del tensors["conv_pre.bias"]
    tensors["conv_pre.weight"] = tensors["conv_pre.weight"].swapaxes(0, 1)
    tensors["mean"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        from_torch(tensors, shapes)
    assert str(error.value).endswith(
        "missing conv_pre.bias; conv_pre.weight is (64, 16, 7), the config says (16, 64, 7); unexpected mean"
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_model_folder_round_trip(files, tmp_path, dtype):
    path = tmp_path / "models" / "one"
    model_folder.save(path, files, dtype, card="# One\n")
    loaded = model_folder.load(path)

    assert sorted(file.name for file in path.iterdir()) == [
        "MODEL_CARD.md",
        "config.json",
        "text_encoder.safetensors",
        "tokenizer",
        "vocoder.safetensors",
    ]
    assert [file.name for file in path.parent.iterdir()] == ["one"]
    assert json.loads((path / "config.json").read_text())["format"] == 1
    assert (path / "MODEL_CARD.md").read_text() == "# One\n"
    assert loaded.config.to_dict() == files.config.to_dict()
    assert loaded.tokenizer.encode("add").ids == [1]
    _assert_equal_trees(loaded.params, files.params)
    for part, params in files.params.items():
        assert params_hash(loaded.params[part]) == params_hash(params)


def test_rounding_once_is_rounding_for_good(files, tmp_path):
    uneven = model_folder.ModelFiles(files.config, jax.tree.map(lambda leaf: leaf * 1.1, files.params))
    model_folder.save(tmp_path / "first", uneven, "float16", card="")
    first = model_folder.load(tmp_path / "first")
    model_folder.save(tmp_path / "second", first, "float16", card="")
    second = model_folder.load(tmp_path / "second")
    assert params_hash(first.params["vocoder"]) != params_hash(uneven.params["vocoder"])
    assert params_hash(first.params["vocoder"]) == params_hash(second.params["vocoder"])
    assert first.tokenizer is None


def test_safetensors_hold_the_stored_type(files, tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    model_folder.save(tmp_path / "one", files, "bfloat16", card="")
    tensors = safetensors_torch.load_file(tmp_path / "one" / "vocoder.safetensors")
    expected = to_torch(files.params["vocoder"])
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_array_equal(tensor.float().numpy(), expected[name])


def test_save_refuses_an_existing_path_and_leaves_it(files, tmp_path):
    (tmp_path / "kept").write_text("mine")
    for path in (tmp_path, tmp_path / "kept"):
        with pytest.raises(UserError, match="exists"):
            model_folder.save(path, files, card="")
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("params", "dtype", "message"),
    [
        ({"vocodr": {}}, "float16", 'did you mean "vocoder"'),
        ({"vocoder": {"conv_pre": {"bias": np.full(3, 1e6, np.float32)}}}, "float16", "float16 cannot hold"),
        ({"vocoder": {"conv_pre": {"bias": np.full(3, np.nan, np.float32)}}}, "float32", "conv_pre.bias"),
        ({}, "float8", 'unknown dtype "float8"'),
    ],
)
def test_save_refusals_leave_nothing_behind(files, tmp_path, params, dtype, message):
    with pytest.raises(UserError, match=message):
        model_folder.save(tmp_path / "one", model_folder.ModelFiles(files.config, params), dtype, card="")
    assert not list(tmp_path.iterdir())


def _damage_config(path):
    (path / "config.json").write_text("{")


def _newer_format(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "format": 2}))


def _other_architecture(path):
    config = json.loads((path / "config.json").read_text())
    config["vocoder"]["num_mels"] = 12
    (path / "config.json").write_text(json.dumps(config))


def _truncate_weights(path):
    file = path / "vocoder.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _damage_tokenizer(path):
    (path / "tokenizer" / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "neither a model folder nor a run folder"),
        (_damage_config, r"config\.json: not valid JSON"),
        (_newer_format, "format 2, this version reads format 1"),
        (
            _other_architecture,
            r"vocoder\.safetensors: .*conv_pre\.weight is \(16, 64, 7\), the config says \(16, 12, 7\)",
        ),
        (_truncate_weights, r"vocoder\.safetensors: damaged"),
        (_damage_tokenizer, r"tokenizer\.json: damaged"),
    ],
)
def test_damaged_folders_are_named(files, tmp_path, damage, message):
    path = tmp_path / "one"
    model_folder.save(path, files, card="")
    damage(path)
    with pytest.raises(UserError, match=message):
        model_folder.load(path)


def test_a_folder_that_shares_parts_holds_the_others_only(tmp_path):
    whole = model_folder.load("tiny")
    whole.params["denoiser"] = jax.tree.map(lambda leaf: leaf * 2, whole.params["denoiser"])
    model_folder.save(tmp_path / "one", whole, "float16", card="", shares="tiny")
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        "config.json",
        "denoiser.safetensors",
        "MODEL_CARD.md",
    }
    loaded = model_folder.load(tmp_path / "one")
    _assert_equal_trees(loaded.params, whole.params)
    assert loaded.tokenizer.to_str() == whole.tokenizer.to_str()
    assert loaded.config == whole.config


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"model": "tiny", "sha256": {"vocoder": "0" * 64}}, "is not the vocoder that the model was exported with"),
        ({"model": "../tiny", "sha256": {"vocoder": "0" * 64}}, 'shares parts with "../tiny", and no such model'),
        ({"model": "tiny", "sha256": {"unet": "0" * 64}}, 'unknown shared part in .* "unet"'),
        ({"model": "tiny", "sha256": {"../vocoder": "0" * 64}}, "not a config"),
        ("tiny", '"shares" must be'),
        ({"model": "tiny", "sha256": ["vocoder"]}, '"shares" must be'),
        ({"sha256": {"vocoder": "0" * 64}}, '"shares" must be'),
    ],
)
def test_parts_are_shared_with_the_very_model_that_was_meant(files, tmp_path, shares, message):
    model_folder.save(tmp_path / "one", files, card="")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(config | {"shares": shares}))
    with pytest.raises(UserError, match=message):
        model_folder.load(tmp_path / "one")


def test_unknown_model(tmp_path):
    with pytest.raises(UserError, match="unknown model folder, run folder or shipped model"):
        model_folder.load(tmp_path / "nothing")


def test_run_folder_without_checkpoint(files, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(files.config.to_dict()))
    with pytest.raises(UserError, match="no checkpoint"):
        model_folder.load(tmp_path)
