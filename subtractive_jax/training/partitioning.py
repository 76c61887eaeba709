"""Which device holds what: the (data, fsdp, tensor) mesh, and one PartitionSpec for every array of the state.

Parameters, EMA and optimizer moments of one parameter share its spec, because their paths end alike. Batches are split
over `data` and `fsdp`, so that FSDP devices see different examples (ZeRO-3); `tensor` splits heads and hidden features
of the attention layers (Shoeybi et al. 2019, Megatron-LM).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from subtractive_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
MIN_SHARDED_SIZE = 2**14  # elements; gathering a smaller array costs more than keeping it everywhere

_INTO_HEADS, _OUT_OF_HEADS = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
_ATTENTION_RULES = (
    # Input projections are split by output features and output projections by input features, so that the activations
    # between them keep one split.
    (r"attentions/.*/to_[qkv]/kernel$", _INTO_HEADS),
    (r"attentions/.*/to_out/0/kernel$", _OUT_OF_HEADS),
    (r"attentions/.*/ff/net/0/proj/kernel$", _INTO_HEADS),
    (r"attentions/.*/ff/net/2/kernel$", _OUT_OF_HEADS),
)
RULES: dict[str, Sequence[tuple[str, PartitionSpec]]] = {  # per part, the first match counts
    "text_encoder": (
        (r"shared/embedding$", PartitionSpec("fsdp", None)),
        (r"SelfAttention/[qkv]/kernel$", _INTO_HEADS),
        (r"SelfAttention/o/kernel$", _OUT_OF_HEADS),
        (r"DenseReluDense/wi(_[01])?/kernel$", _INTO_HEADS),
        (r"DenseReluDense/wo/kernel$", _OUT_OF_HEADS),
    ),
    "autoencoder": (),
    "vocoder": (),
    "base_denoiser": _ATTENTION_RULES,
    "denoiser": _ATTENTION_RULES,
}


def make_mesh(data: int, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A `(data, fsdp, tensor)` mesh over all devices; -1 for one of the axes means all that remain.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = max(len(devices) // max(-math.prod(shape), 1), 1)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise UserError(
            f"mesh.data={data} times mesh.fsdp={fsdp} times mesh.tensor={tensor} does not make {len(devices)} devices; "
            "set one of them to -1"
        )
    # Auto: flax layers carry no sharding annotations, which make_mesh's default (Explicit) would demand.
    return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of the global batch this process must supply, in order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def check_batch_size(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises UserError when the batch does not split evenly."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = shards * accumulation_steps
    if batch_size % parts:
        times = f" times train.accumulation_steps={accumulation_steps}" if accumulation_steps > 1 else ""
        raise UserError(
            f"train.batch_size={batch_size} is not divisible by the {shards} devices of mesh.data and mesh.fsdp"
            f"{times}; use {math.ceil(batch_size / parts) * parts}"
        )


def path_of(key_path: tuple[Any, ...]) -> str:
    """A pytree path as `params/denoiser/conv_in/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def partition_spec(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]]
) -> PartitionSpec:
    """The first rule whose pattern is found in `path`; else large arrays are split over `fsdp` along their largest
    divisible axis, and small ones kept whole.

    Raises:
      UserError: the rule's axis does not divide over the mesh.
    """
    for pattern, spec in rules:
        if re.search(pattern, path):
            for size, axis in zip(shape, spec, strict=False):
                if axis is not None and size % mesh.shape[axis]:
                    raise UserError(f"{path} {shape}: {size} is not divisible by mesh.{axis}={mesh.shape[axis]}")
            return spec
    if math.prod(shape) >= MIN_SHARDED_SIZE:
        for axis in np.argsort(shape, kind="stable")[::-1]:
            if shape[axis] % mesh.shape["fsdp"] == 0:
                return PartitionSpec(*("fsdp" if i == axis else None for i in range(len(shape))))
    return PartitionSpec()


def shardings(state: Any, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]]) -> Any:
    """A NamedSharding for every leaf of an (abstract) state.

    Raises:
      UserError: a rule matches no array, which means a misspelt or outdated pattern; or one does not divide.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    for pattern, _ in rules:
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(f'partition rule "{pattern}" matches no parameter')
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_of(path), leaf.shape, mesh, rules)), state
    )


def gather(params: Any, specs: Any, dtype: DTypeLike) -> Any:
    """Parameters as a step computes with them: kernels in `dtype`, nothing split over `fsdp` any more.

    Said here for all of them at once, since XLA, left to itself, may move activations rather than weights. Casting
    comes first, so that half of the bytes travel; gradients come back in `dtype` too, reduced and scattered.

    Args:
      specs: a NamedSharding for every parameter.
    """

    def gathered(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in sharding.spec))
        whole = NamedSharding(sharding.mesh, spec)

        # A constraint is its own transpose: without this, XLA would reduce whole gradients on every device.
        @jax.custom_vjp
        def constrained(leaf: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(leaf, whole)

        constrained.defvjp(
            lambda leaf: (constrained(leaf), None),
            lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, sharding),),
        )
        return constrained(leaf.astype(dtype) if leaf.ndim > 1 else leaf)

    return jax.tree.map(gathered, params, specs)
