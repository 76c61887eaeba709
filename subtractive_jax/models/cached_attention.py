"""Attention for CPUs: scores of one head and one block of queries at a time, so that they stay in the cache.

FlashAttention's idea (Dao et al. 2022, arXiv:2205.14135): the gradient computes the scores again, from one number a
query that the forward pass keeps.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

RESIDUALS = "attention"  # what policies of rematerialisation call the output and the number a query
_MAX_SCORES = 2**21  # of a block of queries: 8 MB of float32


def _query_block(batch: int, length: int, keys: int) -> int:
    """How many queries to take at once: the most whose scores for one head stay in the cache; 0 if none divide."""
    fitting = (size for size in (512, 256, 128, 64) if length % size == 0)
    return next((size for size in fitting if size == 64 or batch * size * keys <= _MAX_SCORES), 0)


def attend_in_blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of q [B, N, heads, D] over k and v [B, M, heads, D]: [B, N, heads, D]."""
    batch, length = q.shape[:2]
    size = _query_block(batch, length, k.shape[1])
    return (
        _blocked_attention(q, k, v, size) if size else checkpoint_name(jax.nn.dot_product_attention(q, k, v), RESIDUALS)
    )


def _to_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, N, heads, D] -> [heads, blocks, B, size, D]."""
    batch, _, heads, features = x.shape
    return x.reshape(batch, -1, size, heads, features).transpose(3, 1, 0, 2, 4)


def _from_blocks(x: jax.Array) -> jax.Array:
    heads, _, batch, _, features = x.shape
    return x.transpose(2, 1, 3, 0, 4).reshape(batch, -1, heads, features)


_matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, size: int) -> jax.Array:
    return _blocked_attention_forward(q, k, v, size)[0]


def _blocked_attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, size: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def one_head(head: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        queries, keys, values = head

        def one_block(query: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = _matmul(query, keys)
            highest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - highest)
            total = weights.sum(-1, keepdims=True)
            return (_matmul(weights.astype(v.dtype), values) / total).astype(v.dtype), highest + jnp.log(total)

        return jax.lax.map(one_block, queries)

    keys, values = k.transpose(2, 0, 3, 1) * k.shape[-1] ** -0.5, v.transpose(2, 0, 1, 3)
    output, log_total = jax.lax.map(one_head, (_to_blocks(q, size), keys, values))
    output, log_total = (checkpoint_name(x, RESIDUALS) for x in (_from_blocks(output), log_total))
    return output, (q, k, v, output, log_total)


def _blocked_attention_backward(
    size: int, residuals: tuple[jax.Array, ...], d_output: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, output, log_total = residuals
    mean = jnp.sum(d_output.astype(jnp.float32) * output, axis=-1, keepdims=True)  # of the scores' gradient, a query

    def one_head(head: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        queries, log_totals, d_outputs, means, keys, values = head
        keys_t, values_t = keys.swapaxes(1, 2), values.swapaxes(1, 2)

        def one_block(
            sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            (d_keys_t, d_values_t), (query, log_total, d_output, mean) = sums, block
            weights = jnp.exp(_matmul(query, keys_t) - log_total)
            d_scores = (weights * (_matmul(d_output, values_t) - mean)).astype(q.dtype)
            d_keys_t += _matmul(query.swapaxes(1, 2), d_scores)
            d_values_t += _matmul(d_output.swapaxes(1, 2), weights.astype(q.dtype))
            return (d_keys_t, d_values_t), _matmul(d_scores, keys)

        nothing = jnp.zeros(keys_t.shape, jnp.float32), jnp.zeros(values_t.shape, jnp.float32)
        (d_keys_t, d_values_t), d_queries = jax.lax.scan(one_block, nothing, (queries, log_totals, d_outputs, means))
        return d_queries, d_keys_t, d_values_t

    scale = k.shape[-1] ** -0.5
    blocks = (_to_blocks(q, size), log_total, _to_blocks(d_output, size), _to_blocks(mean, size))
    heads = (*blocks, k.transpose(2, 0, 1, 3) * scale, v.transpose(2, 0, 1, 3))
    d_queries, d_keys_t, d_values_t = jax.lax.map(one_head, heads)
    dq, dk, dv = _from_blocks(d_queries), d_keys_t.transpose(1, 3, 0, 2) * scale, d_values_t.transpose(1, 3, 0, 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_blocked_attention.defvjp(_blocked_attention_forward, _blocked_attention_backward)
