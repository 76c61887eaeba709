"""Which device holds what: the (data, fsdp) mesh, and one PartitionSpec for every array of the state.

Parameters, EMA and optimizer moments of one parameter share its spec, because their paths end alike. Batches are split
over both axes, so that FSDP devices see different examples (ZeRO-3).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from subtractive_jax.errors import UserError

AXES = ("data", "fsdp")
MIN_SHARDED_SIZE = 2**14  # elements; gathering a smaller array costs more than keeping it everywhere

_ATTENTION_RULES = (
    # Input projections are split by output features and output projections by input features, so that the activations
    # between them keep one split.
    (r"attentions/.*/to_[qkv]/kernel$", PartitionSpec(None, "fsdp")),
    (r"attentions/.*/to_out/0/kernel$", PartitionSpec("fsdp", None)),
    (r"attentions/.*/ff/net/0/proj/kernel$", PartitionSpec(None, "fsdp")),
    (r"attentions/.*/ff/net/2/kernel$", PartitionSpec("fsdp", None)),
)
RULES: dict[str, Sequence[tuple[str, PartitionSpec]]] = {  # per part, the first match counts
    "text_encoder": (
        (r"shared/embedding$", PartitionSpec("fsdp", None)),
        (r"SelfAttention/[qkv]/kernel$", PartitionSpec(None, "fsdp")),
        (r"SelfAttention/o/kernel$", PartitionSpec("fsdp", None)),
        (r"DenseReluDense/wi(_[01])?/kernel$", PartitionSpec(None, "fsdp")),
        (r"DenseReluDense/wo/kernel$", PartitionSpec("fsdp", None)),
    ),
    "autoencoder": (),
    "vocoder": (),
    "base_denoiser": _ATTENTION_RULES,
    "denoiser": _ATTENTION_RULES,
}


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A `(data, fsdp)` mesh over all devices; -1 for one of the axes means all that remain.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp]
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = max(len(devices) // max(data, fsdp), 1)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise UserError(
            f"mesh.data={data} times mesh.fsdp={fsdp} does not make {len(devices)} devices; set one of them to -1"
        )
    # Auto: flax layers carry no sharding annotations, which make_mesh's default (Explicit) would demand.
    return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of the global batch this process must supply, in order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError when the batch does not split evenly."""
    if batch_size % mesh.size:
        raise UserError(
            f"train.batch_size={batch_size} is not divisible by the {mesh.size} devices; "
            f"use {math.ceil(batch_size / mesh.size) * mesh.size}"
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
