"""What every stage is made of, and the randomness its loss may use."""

import dataclasses
from collections.abc import Callable

import jax

from subtractive_jax import rng
from subtractive_jax.models.network import Params
from subtractive_jax.training.reader import Source
from subtractive_jax.training.train_step import LossFn


@dataclasses.dataclass(frozen=True)
class Task:
    """What a stage learns, by which loss; no data is needed to build it.

    Attributes:
      part: the part of the model that is trained.
      init_params: `init_params(key, start)` returns `{part: params}`, with further entries for what is trained along
        and not kept; `start` holds the parent's parameters to start from, or is empty.
      loss: see `train_step.LossFn`.
      example: one example of a batch, without the batch axis and without `row` and `valid`.
      frozen: entries of the parameters that the loss reads and that do not learn.
    """

    part: str
    init_params: Callable[[jax.Array, Params], Params]
    loss: LossFn
    example: dict[str, jax.ShapeDtypeStruct]
    frozen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training: a task, and what it is learnt from."""

    task: Task
    train: Source
    validation: Source


def example_keys(seed: int, name: str, step: jax.Array, row: jax.Array) -> jax.Array:
    """One key an example [B]: a function of (seed, name, step, row), whatever the devices and hosts."""
    key = rng.stream(seed, name, step)
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(row)


def example_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise [B, *shape]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
