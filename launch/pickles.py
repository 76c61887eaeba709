"""Pickled PyTorch weights, read by PyTorch's own restricted loader and by nothing else."""

from pathlib import Path
from typing import Any

from subtractive_jax.errors import UserError


def _arrays(value: Any, name: str) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return (value.float() if value.is_floating_point() else value).detach().numpy()
    if not isinstance(value, dict):
        raise UserError(f'holds other objects than tensors: "{name}" is of type {type(value).__name__}')
    return {str(key): _arrays(item, str(key)) for key, item in value.items()}


def read(path: Path) -> dict[str, Any]:
    """The tensors of a `.bin` or `.pt` file as numpy arrays, floats in float32; dicts of tensors stay dicts.

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
    return _arrays(content, path.name)
