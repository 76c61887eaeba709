"""What a training run carries from one step to the next: a plain dict of arrays, born sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from subtractive_jax import rng
from subtractive_jax.errors import unknown_name
from subtractive_jax.models.network import Params

State = dict[str, Any]  # params, ema (like params), opt_state, step (int32 scalar: updates done)

SCHEDULES = ("cosine", "constant")


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """`config.train`'s schedule: linear warm-up, then constant or a cosine down to zero at `steps`.

    Raises:
      UserError: unknown schedule.
    """
    train = config.train
    if train.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, train.warmup_steps, train.steps)
    if train.schedule == "constant":
        return optax.warmup_constant_schedule(0.0, train.learning_rate, train.warmup_steps)
    raise unknown_name("train.schedule", train.schedule, SCHEDULES)


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW with clipping by the global norm; biases and norms do not decay."""
    train = config.train
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            learning_rate(config),
            *train.betas,
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def make_init(
    init_params: Callable[[jax.Array, Params], Params], optimizer: optax.GradientTransformation, seed: int
) -> Callable[[Params], State]:
    """`init(start) -> State`, to be jitted with `out_shardings` so that no device ever holds all of a large state.

    Args:
      init_params: `init_params(key, start)`, where `start` are the parent's parameters to start from, or empty.
    """

    def init(start: Params) -> State:
        params = init_params(rng.stream(seed, "init"), start)
        # The EMA must not share its buffers with the parameters, which are donated.
        ema = jax.tree.map(jnp.copy, params)
        return dict(params=params, ema=ema, opt_state=optimizer.init(params), step=jnp.zeros((), jnp.int32))

    return init
