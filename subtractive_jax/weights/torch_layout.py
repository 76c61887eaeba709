"""The rule between our parameters and PyTorch state dicts: the path joined by dots, the leaf renamed and transposed.

| here | there |
|---|---|
| `kernel` [in, out] | `weight` [out, in] |
| `kernel` [*space, in, out] | `weight` [out, in, *space] |
| `kernel` [space, out, in] of a transposed convolution | `weight` [in, out, space] |
| `scale`, `embedding` | `weight` |
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.errors import UserError
from subtractive_jax.models.network import Params

_WEIGHTS = ("kernel", "scale", "embedding")
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # T5 files may hold the token embedding under both names


def _leaves(params: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    for key, value in params.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _name(path: tuple[str, ...]) -> str:
    *module, leaf = path
    return ".".join([*module, "weight" if leaf in _WEIGHTS else leaf])


def _to_torch_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    axes = tuple(range(ndim))
    return (axes[-1], axes[-2], *axes[:-2]) if path[-1] == "kernel" else axes


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """Parameters as a PyTorch state dict of numpy arrays, same dtype."""
    return {
        _name(path): np.ascontiguousarray(np.asarray(leaf).transpose(_to_torch_axes(path, leaf.ndim)))
        for path, leaf in _leaves(params)
    }


def torch_shapes(shapes: Params) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the PyTorch state dict that a parameter tree becomes, from `Network.shapes()`."""
    return {
        _name(path): tuple(leaf.shape[axis] for axis in _to_torch_axes(path, leaf.ndim))
        for path, leaf in _leaves(shapes)
    }


def from_torch(tensors: Mapping[str, np.ndarray], shapes: Params) -> Params:
    """The inverse of `to_torch`, in float32.

    Args:
      tensors: a state dict of numpy arrays of any float type.
      shapes: the parameter tree to fill, `Network.shapes()`.

    Raises:
      UserError: names every tensor that is missing, not expected, of another shape, or not of a float type.
    """
    params: Params = {}
    problems = []
    expected = torch_shapes(shapes)
    for path, leaf in _leaves(shapes):
        name, axes = _name(path), _to_torch_axes(path, leaf.ndim)
        if name not in tensors:
            problems.append(f"missing {name}")
            continue
        if tensors[name].shape != expected[name]:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, the config says {expected[name]}")
            continue
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            problems.append(f"{name} holds {tensors[name].dtype}, not floating-point numbers")
            continue
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(tensors[name].transpose(np.argsort(axes)), jnp.float32)
    for name in sorted(tensors.keys() - expected):
        if _TIED.get(name) not in expected:
            problems.append(f"unexpected {name}")
    if problems:
        raise UserError(f"weights do not fit the config: {'; '.join(problems)}")
    return params
