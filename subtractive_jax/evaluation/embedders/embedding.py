"""What an embedder gives, where its weights lie, and how its network is run."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import safetensors
import safetensors.numpy

from subtractive_jax.errors import UserError

Params = Mapping[str, Any]  # arrays under their published names, in their published layout


@dataclasses.dataclass(frozen=True)
class Embedding:
    """One recording: `patches` `[patches, dimensions]` float32; `logits` `[classes]` float32, None without classes."""

    patches: np.ndarray
    logits: np.ndarray | None = None


class Embedder(Protocol):
    """What `distances` are computed on. `embed` takes mono `[samples]` float32 at any rate in Hz."""

    name: str

    def embed(self, audio: np.ndarray, sample_rate: int) -> Embedding: ...


def installed_weights(name: str) -> Path:
    """Where `launch.convert` puts an embedder's weights unless told otherwise."""
    return Path(sys.prefix) / "share" / "subtractive_jax" / f"{name}.safetensors"


def read_weights(name: str, path: Path | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The parameters that `launch.convert --from=NAME` wrote to `path` or, without one, to `installed_weights`.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    path = path or installed_weights(name)
    if not path.is_file():
        raise UserError(f"{path}: no weights of {name}; write them with `python -m launch.convert --from={name}`")
    try:
        params = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); write it again with launch.convert --from={name}") from error
    check_shapes(str(path), params, shapes)
    return params


def check_shapes(where: str, params: Params, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a `UserError` that names the first parameter that is missing or of another shape."""
    for key, shape in shapes.items():
        if key not in params:
            raise UserError(f'{where}: other weights than expected: "{key}" is missing')
        if params[key].shape != shape:
            raise UserError(f'{where}: other weights than expected: "{key}" is {params[key].shape} and not {shape}')


def in_batches(network: Callable[[np.ndarray], Any], inputs: np.ndarray, batch_size: int) -> Any:
    """`network` of inputs `[N, ...]` as numpy arrays `[N, ...]`, in batches of one size, so that it compiles once."""
    results = []
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        full = np.zeros((batch_size, *inputs.shape[1:]), np.float32)
        full[: len(batch)] = batch
        results.append(jax.tree.map(np.asarray, network(full)))
    return jax.tree.map(lambda *outputs: np.concatenate(outputs)[: len(inputs)], *results)


def linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    """PyTorch's `nn.Linear` called `name`, on `[..., inputs]`."""
    y = x @ params[f"{name}.weight"].T
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def batch_norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    """PyTorch's batch norm called `name` at inference, on `[..., channels]`."""
    scale = params[f"{name}.weight"] * jax.lax.rsqrt(params[f"{name}.running_var"] + 1e-5)
    return (x - params[f"{name}.running_mean"]) * scale + params[f"{name}.bias"]


def convolution(params: Params, name: str, x: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """PyTorch's `nn.Conv2d` called `name`, on `[B, height, width, channels]`."""
    y = jax.lax.conv_general_dilated(
        x,
        params[f"{name}.weight"],
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y
