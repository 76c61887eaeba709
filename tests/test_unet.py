"""What the denoiser adds to the published UNet: a widened input, a stem token, a text mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import minimal
from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.models import unet

TEXT_DIM, TOKENS = 32, 6


@pytest.fixture(scope="module")
def config():
    return minimal.get_config()


@functools.cache
def _denoiser(part):
    network = parts.network(part, minimal.get_config())
    return jax.jit(network.apply), jax.jit(network.init)(jax.random.key(0))


def _inputs(channels, batch=2):
    draw = np.random.default_rng()
    return dict(
        x=draw.standard_normal((batch, 8, 8, channels), np.float32),
        timestep=np.full(batch, 300),
        text_states=draw.standard_normal((batch, TOKENS, TEXT_DIM), np.float32),
        text_mask=np.arange(TOKENS) < np.array([[TOKENS], [2]])[:batch],
    )


def test_widened_input_keeps_the_output(config):
    apply, params = _denoiser("base_denoiser")
    inputs = _inputs(8)
    before = apply(params, **inputs)

    wide = unet.widen_input(params, 16)
    context = np.random.default_rng().standard_normal((2, 8, 8, 8), np.float32)
    after = apply(wide, **{**inputs, "x": np.concatenate([inputs["x"], context], -1)})

    np.testing.assert_allclose(after, before, atol=1e-5)
    np.testing.assert_array_equal(wide["conv_in"]["bias"], params["conv_in"]["bias"])
    expected = dict(parts.network("denoiser", config).shapes())
    del expected["stem_embedding"]
    assert jax.tree.map(jnp.shape, wide) == jax.tree.map(jnp.shape, expected)


def test_input_cannot_be_narrowed():
    with pytest.raises(UserError, match="8 input channels"):
        unet.widen_input(_denoiser("base_denoiser")[1], 4)


def test_stem_token_matters():
    apply, params = _denoiser("denoiser")
    inputs = _inputs(16)
    drums, bass, none = (apply(params, **inputs, stem=stem) for stem in (np.array([0, 0]), np.array([1, 1]), None))
    assert jnp.abs(drums - bass).max() > 1e-5
    assert jnp.abs(drums - none).max() > 1e-5


def test_stem_token_is_never_masked():
    apply, params = _denoiser("denoiser")
    inputs = {**_inputs(16), "text_mask": np.eye(1, TOKENS, dtype=bool).repeat(2, 0)}
    drums, bass = (apply(params, **inputs, stem=np.array([stem, stem])) for stem in (0, 1))
    assert jnp.abs(drums - bass).max() > 1e-5


def test_masked_text_is_not_seen_and_unmasked_text_is():
    apply, params = _denoiser("denoiser")
    inputs, stem = _inputs(16), np.array([0, 1])
    before = apply(params, **inputs, stem=stem)

    padding = np.where(inputs["text_mask"][..., None], inputs["text_states"], 100.0)
    np.testing.assert_array_equal(apply(params, **{**inputs, "text_states": padding}, stem=stem), before)

    words = np.where(inputs["text_mask"][..., None], -inputs["text_states"], inputs["text_states"])
    assert (jnp.abs(apply(params, **{**inputs, "text_states": words}, stem=stem) - before).max((1, 2, 3)) > 1e-5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(down_block_types=("CrossAttnDownBlock2D", "DownBlok2D", "DownBlock2D")), 'did you mean "DownBlock2D"'),
        (dict(up_block_types=("UpBlock2D",)), "names 3 blocks"),
        (dict(attention_head_dim=3), "does not divide 16 channels"),
        (dict(norm_num_groups=7), "norm_num_groups 7 does not divide"),
        (dict(transformer_layers_per_block=(1, 2)), "names 2 blocks"),
    ],
)
def test_bad_configs_are_named(config, change, message):
    fields = ConfigDict({**config.denoiser.to_dict(), **change})
    with pytest.raises(UserError, match=message):
        unet.denoiser(fields, 8, 8).shapes()


def test_unknown_part(config):
    with pytest.raises(UserError, match='did you mean "vocoder"'):
        parts.network("vocodr", config)
