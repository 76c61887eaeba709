"""Rematerialisation: the same gradients from fewer kept bytes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from ml_collections import ConfigDict

from configs import minimal
from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.models import unet

TOLERANCE = 1e-4  # of the largest value: XLA sums in another order


@pytest.fixture(scope="module")
def config():
    config = minimal.get_config("base")
    blocks = dict(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )
    return ConfigDict({**config.to_dict(), "denoiser": {**config.denoiser.to_dict(), **blocks}})


@pytest.fixture(scope="module")
def loss(config):
    draw = np.random.default_rng()
    x, weights = draw.standard_normal((2, 2, 8, 16, 8), np.float32)
    text_states = draw.standard_normal((2, 6, 32), np.float32)
    text_mask = np.arange(6) < np.array([[6], [2]])

    def with_policy(remat):
        network = parts.network("base_denoiser", config, remat)
        return lambda params: jnp.mean(weights * network.apply(params, x, np.array([3, 500]), text_states, text_mask))

    return with_policy


@pytest.fixture(scope="module")
def params(config):
    return jax.jit(parts.network("base_denoiser", config).init)(jax.random.key(np.random.default_rng().integers(2**31)))


def _value_and_gradient(function, params):
    return jax.jit(jax.value_and_grad(function))(params)


@pytest.fixture(scope="module")
def gradients(loss, params):
    return _value_and_gradient(loss("none"), params)


@pytest.mark.parametrize("remat", sorted(unet.REMAT.keys() - {"none"}))
def test_every_policy_gives_the_same_gradients(remat, loss, params, gradients):
    value, gradient = _value_and_gradient(loss(remat), params)
    np.testing.assert_allclose(value, gradients[0], rtol=TOLERANCE)

    def check(got, expected):
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * jnp.abs(expected).max() + 1e-9)

    jax.tree.map(check, gradient, gradients[1])


def _kept_bytes(function, params, capsys):
    """What the gradient reads besides the arguments, in bytes."""
    print_saved_residuals(function, params)
    lines = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    total = 0
    for line in lines:
        dtype, _, shape = line.split("]")[0].partition("[")
        size = {"f32": 4, "bf16": 2, "i32": 4, "ui8": 1, "bool": 1, "key<fry>": 8}[dtype.replace("float32", "f32")]
        total += size * math.prod(map(int, filter(None, shape.split(","))))
    return total


def test_policies_keep_less_and_less(loss, params, capsys):
    kept = [_kept_bytes(loss(remat), params, capsys) for remat in ("none", "products", "attention", "layers")]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(unet.REMAT)
    assert kept[1] < 0.6 * kept[0]


def test_unknown_policy(config):
    with pytest.raises(UserError, match='unknown remat "layer"; did you mean "layers"'):
        parts.network("base_denoiser", config, "layer")
