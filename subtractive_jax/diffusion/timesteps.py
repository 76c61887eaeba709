"""Which timestep an example is noised to: drawn in training, spread evenly in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.errors import unknown_name

DISTRIBUTIONS = ("uniform", "logit_normal")
_GOLDEN = np.uint32(2654435769)  # 2^32 / golden ratio
_EIGHTH = np.uint32(2**29)  # with this offset the first 4, 8 and 16 rows fill all quarters alike


def draw(distribution: str, keys: jax.Array, count: int) -> jax.Array:
    """A timestep below `count` for each of `keys` [B]: int32 [B].

    "logit_normal" prefers the middle: sigmoid of a standard normal (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    Raises:
      UserError: unknown `distribution`.
    """
    if distribution == "uniform":
        share = jax.vmap(jax.random.uniform)(keys)
    elif distribution == "logit_normal":
        share = jax.nn.sigmoid(jax.vmap(jax.random.normal)(keys))
    else:
        raise unknown_name("loss.timesteps", distribution, DISTRIBUTIONS)
    return jnp.int32(share * count)


def spread(rows: jax.Array, count: int) -> jax.Array:
    """A fixed timestep below `count` for each of `rows` [B]: int32 [B].

    Multiples of the golden ratio modulo 1, which fill the range evenly however many rows there are.
    """
    fraction = rows.astype(jnp.uint32) * _GOLDEN + _EIGHTH
    return jnp.int32((fraction >> 8) * 2.0**-24 * count)  # 24 bits: what float32 holds without rounding up to 1
