"""Pickled PyTorch weights, read by PyTorch's own restricted loader and by nothing else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from subtractive_jax.errors import UserError


def _arrays(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    import torch

    if isinstance(value, dict):
        for key, item in value.items():
            yield from _arrays(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized and name:
        yield name, (value.float() if value.is_floating_point() else value).detach().numpy()
    else:
        raise UserError(f'holds other objects than plain tensors: "{name}" is of type {type(value).__name__}')


def _numpy_globals() -> list[Any]:
    """What the restricted loader needs for arrays that stand beside the tensors: data, and no code."""
    from numpy._core import multiarray

    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # before and since numpy 2
    return [*((multiarray._reconstruct, name) for name in names), np.ndarray, np.dtype, np.dtypes.Int64DType]


def read(path: Path, within: str = "") -> dict[str, np.ndarray]:
    """The tensors of a `.bin` or `.pt` file as numpy arrays, floats in float32; names of nested dicts joined by dots.

    Args:
      within: the entry of the outermost dict to read; what stands beside it (a trainer's state) is left out.

    Raises:
      UserError: PyTorch is not installed, or the file is damaged or holds anything but tensors in dicts.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("a pickle, which needs the extra `convert`: pip install 'subtractive-jax[convert]'") from error
    try:
        with torch.serialization.safe_globals(_numpy_globals() if within else []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler raises for bytes that are not what they should be
        raise UserError("damaged, or holds other objects than tensors, which are never unpickled") from error
    if within:
        if not isinstance(content, dict) or within not in content:
            raise UserError(f'holds no "{within}"')
        content = content[within]
    return dict(_arrays(content, ""))
