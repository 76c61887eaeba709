"""Low-rank adapters: alone they learn, and a run with them exports whole kernels."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from subtractive_jax.errors import UserError
from subtractive_jax.training import checkpoint, loop, lora
from subtractive_jax.weights import model_folder

_CONFIG = ml_collections.ConfigDict(dict(rank=2, alpha=6.0, layers=("to_q", "to_out/0")))


def _params():
    kernels = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    attention = {"to_q": {"kernel": kernels[0]}, "to_out": {"0": {"kernel": kernels[1], "bias": np.ones(4)}}}
    return {"denoiser": {"attn": attention, "proj": {"kernel": kernels[2]}}, "head": {"kernel": kernels[2]}}


def test_adapters_change_nothing_until_they_learn_and_then_add_alpha_over_rank_times_their_product():
    init = lora.with_adapters(lambda key, start: start, "denoiser", _CONFIG, seed=0)
    params = init(jax.random.key(0), _params())
    adapters = params["lora"]["denoiser"]["attn"]
    assert set(adapters) == {"to_q", "to_out"} and adapters["to_q"]["down"].shape == (5, 2)
    assert float(jnp.abs(adapters["to_q"]["down"] - adapters["to_out"]["0"]["down"]).max()) > 0.0
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, _CONFIG), _params())

    adapters["to_q"]["up"] = jnp.ones((2, 4))
    merged = lora.merge(params, _CONFIG)["denoiser"]["attn"]["to_q"]["kernel"]
    expected = _params()["denoiser"]["attn"]["to_q"]["kernel"] + 3.0 * np.asarray(adapters["to_q"]["down"]) @ np.ones(
        (2, 4)
    )
    np.testing.assert_allclose(merged, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("layers", "said"),
    [(("to_q", "to_x"), 'no layer is called "to_x"'), (("conv",), r"kernel of conv is \(3, 3, 4, 4\)")],
)
def test_layers_that_cannot_be(layers, said):
    config = ml_collections.ConfigDict(dict(_CONFIG, layers=layers))
    params = {"denoiser": {**_params()["denoiser"], "conv": {"kernel": np.zeros((3, 3, 4, 4))}}}
    with pytest.raises(UserError, match=said):
        lora.with_adapters(lambda key, start: start, "denoiser", config, seed=0)(jax.random.key(0), params)


def test_a_run_with_adapters_learns_them_alone_resumes_exactly_and_exports_whole_kernels(world, tmp_path):
    def config(updates):
        config = world.config(steps=updates, schedule="constant", warmup_steps=0, learning_rate=1e-2, batch_size=4)
        config.train.lora.rank = 2
        config.mesh.update(dict(data=2, fsdp=2, tensor=2))
        return config

    whole = loop.train(config(3), world.data_dir, tmp_path / "whole")
    loop.train(config(2), world.data_dir, tmp_path / "parts")
    parts = loop.train(config(3), world.data_dir, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)

    begun = loop.train(config(0), world.data_dir, tmp_path / "begun")
    jax.tree.map(np.testing.assert_array_equal, whole["params"]["denoiser"], begun["params"]["denoiser"])
    ups = jax.tree_util.tree_leaves_with_path(whole["params"]["lora"])
    assert all(np.any(leaf) for path, leaf in ups if path[-1].key == "up")
    moments = sum(leaf.size for leaf in jax.tree.leaves(whole["opt_state"]))
    assert moments < 3 * sum(leaf.size for _, leaf in ups)

    exported = model_folder.load(tmp_path / "whole").params["denoiser"]
    part, ema = checkpoint.load_ema(tmp_path / "whole")
    expected = lora.merge(jax.device_get(whole["ema"]), config(3).train.lora)["denoiser"]
    assert part == "denoiser" and jax.tree.structure(exported) == jax.tree.structure(begun["params"]["denoiser"])
    for result in (exported, ema):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result, expected)
