"""What a training run carries from one step to the next: a plain dict of arrays, born sharded."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from subtractive_jax import rng
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models.network import Params
from subtractive_jax.training import lora
from subtractive_jax.training.train_step import State

SCHEDULES = ("cosine", "constant")


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """`config.train`'s schedule: linear warm-up, then constant or a cosine down to zero at `steps`.

    Raises:
      UserError: unknown schedule, or a warm-up without an end.
    """
    train = config.train
    if train.schedule == "cosine":
        if train.steps <= train.warmup_steps:
            raise UserError(f"config.train.steps={train.steps} must be above train.warmup_steps={train.warmup_steps}")
        return optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, train.warmup_steps, train.steps)
    if train.schedule == "constant":
        if not train.warmup_steps:  # optax would stay at the initial value, zero, for ever
            return optax.constant_schedule(train.learning_rate)
        return optax.warmup_constant_schedule(0.0, train.learning_rate, train.warmup_steps)
    raise unknown_name("train.schedule", train.schedule, SCHEDULES)


def learns(params: Params, train: ml_collections.ConfigDict, frozen: Sequence[str] = ()) -> Any:
    """Which of `{part: params, ...}` learn, as a tree of bools.

    The adapters, if `train.lora` has any; else what is below the prefixes `train.only`; or all, if there are none; but
    nothing of the entries `frozen`.

    Raises:
      UserError: a prefix with nothing below it.
    """
    if train.lora.rank:
        return {entry: jax.tree.map(lambda _, entry=entry: entry == lora.ENTRY, tree) for entry, tree in params.items()}
    paths = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[1:], simple=True, separator="/"), params
    )
    for prefix in train.only:
        if not any(path.startswith(f"{prefix}/") for path in jax.tree.leaves(paths)):
            raise UserError(f'config.train.only: no parameter is called "{prefix}/..."; see parameters.txt of a run')
    prefixes = tuple(f"{prefix}/" for prefix in train.only) or ("",)
    return {
        entry: jax.tree.map(lambda path, entry=entry: entry not in frozen and path.startswith(prefixes), tree)
        for entry, tree in paths.items()
    }


def clip_each(max_norm: float) -> optax.GradientTransformation:
    """Clips each entry of `{part: params, ...}` by its own norm: no discriminator's gradient scales the model's."""
    clip = optax.clip_by_global_norm(max_norm)
    return optax.stateless(
        lambda updates, _: {entry: clip.update(tree, optax.EmptyState())[0] for entry, tree in updates.items()}
    )


def make_optimizer(config: ml_collections.ConfigDict, frozen: Sequence[str] = ()) -> optax.GradientTransformation:
    """AdamW with clipping; biases and norms do not decay.

    Parameters that do not learn (see `learns`) stay as they are and have no moments.
    """
    train = config.train
    adamw = optax.chain(
        clip_each(train.clip_norm),
        optax.adamw(
            learning_rate(config),
            *train.betas,
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )
    if not train.only and not train.lora.rank and not frozen:
        return adamw
    return optax.partition({True: adamw, False: optax.set_to_zero()}, lambda params: learns(params, train, frozen))


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
