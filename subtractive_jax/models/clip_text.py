"""The text encoder of Stable Diffusion 1.x: CLIP's (Radford et al. 2021, arXiv:2103.00020).

As transformers' `CLIPTextModel` computes it, with its names. Attention is causal; padding is a token like any other.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models.network import Network, normal

_EMBEDDING_STD = 0.02


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": _quick_gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class _SelfAttention(nnx.Module):
    def __init__(self, features: int, num_heads: int, rngs: nnx.Rngs):
        if features % num_heads:
            raise UserError(f"text_encoder: num_attention_heads {num_heads} does not divide hidden_size {features}")
        linear = functools.partial(nnx.Linear, features, features, kernel_init=normal(), rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = linear(), linear(), linear(), linear()
        self.num_heads = num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (
            y.reshape(*x.shape[:2], self.num_heads, -1) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return self.out_proj(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, kernel_init=normal(), rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, kernel_init=normal(), rngs=rngs)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


def _layer_norm(config: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)


class _Layer(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.layer_norm1, self.layer_norm2 = _layer_norm(config, rngs), _layer_norm(config, rngs)
        self.self_attn = _SelfAttention(config.hidden_size, config.num_attention_heads, rngs)
        self.mlp = _MLP(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        embed = functools.partial(
            nnx.Embed, features=config.hidden_size, embedding_init=normal(_EMBEDDING_STD), rngs=rngs
        )
        self.token_embedding = embed(config.vocab_size)
        self.position_embedding = embed(config.max_position_embeddings)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class _Encoder(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.layers = nnx.List(_Layer(config, rngs) for _ in range(config.num_hidden_layers))


class _TextTransformer(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.embeddings = _Embeddings(config, rngs)
        self.encoder = _Encoder(config, rngs)
        self.final_layer_norm = _layer_norm(config, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embeddings(ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextModel(nnx.Module):
    """See `encoder`."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.text_model = _TextTransformer(config, rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        del mask  # of no effect on the tokens before it: attention is causal
        return self.text_model(ids)


def encoder(config: Any) -> Network:
    """The encoder: `apply(params, ids [B, L] int32, mask [B, L]) -> states [B, L, hidden_size]` float32.

    The states after the last layer norm, as Stable Diffusion 1.x takes them. `mask` is there to be called as T5 is; no
    token sees one that comes later, so the states of a text are the same with and without padding after it.

    Args:
      config: transformers' `CLIPTextConfig` fields.

    Raises:
      UserError: another `hidden_act`, or heads that do not divide `hidden_size`.
    """
    if config.hidden_act not in _ACTIVATIONS:
        raise unknown_name("text_encoder.hidden_act", config.hidden_act, _ACTIVATIONS)
    return Network(lambda rngs: CLIPTextModel(config, rngs))
