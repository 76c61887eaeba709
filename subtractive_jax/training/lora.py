"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv:2106.09685): W + alpha / rank * down @ up, of which down and up learn.

Adapters are merged into the kernels before the model is applied, in training and on export, so no model knows of them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from subtractive_jax import rng
from subtractive_jax.errors import UserError
from subtractive_jax.models.network import Params

ENTRY = "lora"  # beside the part, in a state's parameters


InitParams = Callable[[jax.Array, Params], Params]  # see `stage.Task`


def with_adapters(init_params: InitParams, part: str, config: Any, seed: int) -> InitParams:
    """Initial parameters with adapters beside the part's, which change nothing yet: `up` starts from zero.

    Args:
      config: `config.train.lora`.
      seed: of the adapters' first values.

    Raises (when it is called):
      UserError: a layer that the part does not have, or that is no matrix.
    """

    def init(key: jax.Array, start: Params) -> Params:
        params = init_params(key, start)
        return params | {ENTRY: {part: _adapters(params[part], config, seed)}}

    return init


def merge(params: Params, config: Any) -> Params:
    """`{part: params, ..., "lora": {part: adapters}}` without the last entry: adapters are in the part's kernels."""

    def merged(values: Any, adapters: Any) -> Any:
        if "down" in adapters:
            return {
                **values,
                "kernel": values["kernel"] + config.alpha / config.rank * (adapters["down"] @ adapters["up"]),
            }
        return {key: merged(value, adapters[key]) if key in adapters else value for key, value in values.items()}

    rest = {entry: tree for entry, tree in params.items() if entry != ENTRY}
    return merged(rest, params[ENTRY])


def _adapters(params: Params, config: Any, seed: int) -> Params:
    shapes = {path: shape for path, shape in _kernels(params) if path.endswith(tuple(f"/{x}" for x in config.layers))}
    for layer in config.layers:
        if not any(path.endswith(f"/{layer}") for path in shapes):
            raise UserError(f'config.train.lora.layers: no layer is called "{layer}"; see parameters.txt of a run')
    # One draw for all: XLA takes long to compile many.
    values = jax.random.normal(rng.stream(seed, ENTRY), (config.rank * sum(shape[0] for shape in shapes.values()),))
    adapters: Params = {}
    for path, shape in shapes.items():
        if len(shape) != 2:
            raise UserError(f"config.train.lora.layers: the kernel of {path[1:]} is {shape}, not a matrix")
        down, values = jnp.split(values, [config.rank * shape[0]])
        *above, name = path[1:].split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), above, adapters)[name] = dict(
            down=down.reshape(shape[0], config.rank) * shape[0] ** -0.5, up=jnp.zeros((config.rank, shape[1]))
        )
    return adapters


def _kernels(params: Params, path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every layer with a kernel: its path, after a slash, and the kernel's shape."""
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _kernels(value, f"{path}/{name}")
        elif name == "kernel":
            yield path, value.shape
