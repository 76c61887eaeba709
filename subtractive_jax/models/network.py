"""The functional boundary: an nnx module seen from outside as `init(key) -> params` and `apply(params, ...)`.

Parameters are nested dicts with string keys whose paths are the published PyTorch names
(`down_blocks/0/resnets/1/conv1/kernel`), so checkpoints, partition rules and weight files all speak one language.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]


class _Draws:
    """Stands where modules expect `nnx.Rngs`: one long normal draw, of which each parameter takes the next piece.

    A draw for each parameter gives the same distribution, but XLA takes minutes to compile hundreds of them.
    """

    def __init__(self, values: jax.Array | None = None):
        self.values, self.used = values, 0

    def params(self) -> "_Draws":
        return self

    def take(self, shape: tuple[int, ...]) -> jax.Array:
        start, self.used = self.used, self.used + math.prod(shape)
        return jnp.zeros(shape) if self.values is None else self.values[start : self.used].reshape(shape)


def normal(std: float | None = None) -> Callable[..., jax.Array]:
    """An initializer: normal with `std`, or with 1 / sqrt(inputs) of a kernel [*size, in, out] (LeCun et al. 1998)."""

    def initialize(draws: _Draws, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return (std or math.prod(shape[:-1]) ** -0.5) * draws.take(shape).astype(dtype)

    return initialize


def _with_string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _with_string_keys(value) for key, value in tree.items()}


def _with_keys_of(tree: Any, template: Any) -> Any:
    if not isinstance(template, dict):
        return tree
    return {key: _with_keys_of(tree[str(key)], value) for key, value in template.items()}


class Network:
    """Two pure functions around a module: safe to jit, shard, differentiate and checkpoint."""

    def __init__(self, build: Callable[[Any], nnx.Module]):
        self._build = build

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self._build(_Draws())))

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        counted = _Draws()
        jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(self._build(counted))))
        draws = _Draws(jax.random.normal(key, (counted.used,)))
        return _with_string_keys(nnx.to_pure_dict(nnx.state(self._build(draws))))

    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s, without allocating anything."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Calls `method` of the module with these parameters."""
        graphdef, abstract = self._abstract
        state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the cached one must never hold tracers
        nnx.replace_by_pure_dict(state, _with_keys_of(params, nnx.to_pure_dict(state)))
        return getattr(nnx.merge(graphdef, state), method)(*args, **kwargs)
