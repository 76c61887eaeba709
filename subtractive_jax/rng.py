"""Random keys as a function of (seed, name, step): nothing is carried, nothing needs saving."""

import hashlib

import jax


def stream(seed: int, name: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of stream `name` at `step`; `step` may be traced.

    Args:
      seed: the run's or job's seed.
      name: what the randomness is for, such as "noise" or "timestep".
      step: optimizer step, example id or window index.
    """
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), digest), step)
