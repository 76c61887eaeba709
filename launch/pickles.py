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


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.bin` or `.pt` file as numpy arrays, floats in float32; names of nested dicts joined by dots.

    Raises:
      UserError: PyTorch is not installed, or the file is damaged or holds anything but tensors in dicts.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("a pickle, which needs the extra `convert`: pip install 'subtractive-jax[convert]'") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler raises for bytes that are not what they should be
        raise UserError("damaged, or holds other objects than tensors, which are never unpickled") from error
    return dict(_arrays(content, ""))
