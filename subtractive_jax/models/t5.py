"""The text encoder: T5 v1.1 (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020 for the gated feed-forward).

As transformers' `T5EncoderModel` computes it, with its names.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from subtractive_jax.errors import unknown_name
from subtractive_jax.models.network import Network, normal

_FEED_FORWARDS = ("gated-gelu", "relu")


def relative_position_bucket(relative: jax.Array, num_buckets: int, max_distance: int) -> jax.Array:
    """The bias bucket of `key position - query position`: exact when near, logarithmic when far, by direction."""
    num_buckets //= 2
    exact = num_buckets // 2
    distance = jnp.abs(relative)
    far = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = jnp.minimum(exact + far.astype(jnp.int32), num_buckets - 1)
    return jnp.where(relative > 0, num_buckets, 0) + jnp.where(distance < exact, distance, far)


class _RMSNorm(nnx.Module):
    def __init__(self, features: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * self.scale[...]


def _linear(in_features: int, out_features: int, rngs: nnx.Rngs, std: float | None = None) -> nnx.Linear:
    init = normal(in_features**-0.5 if std is None else std)
    return nnx.Linear(in_features, out_features, use_bias=False, kernel_init=init, rngs=rngs)


class _SelfAttention(nnx.Module):
    def __init__(self, config: Any, has_relative_bias: bool, rngs: nnx.Rngs):
        inner = config.num_heads * config.d_kv
        # No division by sqrt(d_kv) in the attention: T5 puts it into the initial queries.
        self.q = _linear(config.d_model, inner, rngs, std=(config.d_model * config.d_kv) ** -0.5)
        self.k = _linear(config.d_model, inner, rngs)
        self.v = _linear(config.d_model, inner, rngs)
        self.o = _linear(inner, config.d_model, rngs)
        if has_relative_bias:
            init = normal(config.d_model**-0.5)
            self.relative_attention_bias = nnx.Embed(
                config.relative_attention_num_buckets, config.num_heads, embedding_init=init, rngs=rngs
            )
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = (y.reshape(*x.shape[:2], self.num_heads, -1) for y in (self.q(x), self.k(x), self.v(x)))
        y = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        return self.o(y.reshape(*x.shape[:2], -1))


class _AttentionLayer(nnx.Module):
    def __init__(self, config: Any, has_relative_bias: bool, rngs: nnx.Rngs):
        self.SelfAttention = _SelfAttention(config, has_relative_bias, rngs)
        self.layer_norm = _RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        return x + self.SelfAttention(self.layer_norm(x), bias, mask)


class _GatedGelu(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.wi_0 = _linear(config.d_model, config.d_ff, rngs)
        self.wi_1 = _linear(config.d_model, config.d_ff, rngs)
        self.wo = _linear(config.d_ff, config.d_model, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class _Relu(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.wi = _linear(config.d_model, config.d_ff, rngs)
        self.wo = _linear(config.d_ff, config.d_model, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(jax.nn.relu(self.wi(x)))


class _FeedForwardLayer(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        feed_forward = _GatedGelu if config.feed_forward_proj == "gated-gelu" else _Relu
        self.DenseReluDense = feed_forward(config, rngs)
        self.layer_norm = _RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class _Block(nnx.Module):
    def __init__(self, config: Any, has_relative_bias: bool, rngs: nnx.Rngs):
        self.layer: nnx.List[Any] = nnx.List(
            [_AttentionLayer(config, has_relative_bias, rngs), _FeedForwardLayer(config, rngs)]
        )

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        return self.layer[1](self.layer[0](x, bias, mask))


class _Stack(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.block = nnx.List(_Block(config, i == 0, rngs) for i in range(config.num_layers))
        self.final_layer_norm = _RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.bucket = functools.partial(
            relative_position_bucket,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        positions = jnp.arange(x.shape[1])
        buckets = self.bucket(positions[None, :] - positions[:, None])
        bias = self.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)  # every block uses the first's
        bias = jnp.moveaxis(bias, -1, 0)[None]
        for block in self.block:
            x = block(x, bias, mask[:, None, None, :])
        return self.final_layer_norm(x)


class T5EncoderModel(nnx.Module):
    """See `encoder`."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        init = normal(1.0)
        self.shared = nnx.Embed(config.vocab_size, config.d_model, embedding_init=init, rngs=rngs)
        self.encoder = _Stack(config, rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return self.encoder(self.shared(ids), mask.astype(bool))


def encoder(config: Any) -> Network:
    """The encoder: `apply(params, ids [B, L] int32, mask [B, L]) -> states [B, L, d_model]` float32.

    `mask` is nonzero at tokens and zero at padding, whose states mean nothing.

    Args:
      config: transformers' `T5Config` fields; `feed_forward_proj` is "gated-gelu" (v1.1, FLAN) or "relu" (v1.0).

    Raises:
      UserError: another `feed_forward_proj`.
    """
    if config.feed_forward_proj not in _FEED_FORWARDS:
        raise unknown_name("text_encoder.feed_forward_proj", config.feed_forward_proj, _FEED_FORWARDS)
    return Network(lambda rngs: T5EncoderModel(config, rngs))
