"""Checkpoints of a run: orbax, asynchronous, named after the number of updates done. The only file that knows orbax."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from subtractive_jax.errors import UserError, warn
from subtractive_jax.models.network import Params
from subtractive_jax.training import lora, run_folder
from subtractive_jax.training.train_step import State

DIRECTORY = "checkpoints"
DAMAGED = "damaged"  # where unreadable checkpoints of a run go
_ITEMS = {  # kept apart, so that sampling reads no optimizer state
    "train": ocp.StandardCheckpointHandler,
    "ema": ocp.StandardCheckpointHandler,
    "position": ocp.JsonCheckpointHandler,
}
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: keeps places apart
_MURMUR = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))  # shifts and factors of MurmurHash3's finaliser (Appleby)


@jax.jit
def _digests(state: State) -> list[jax.Array]:
    """A sum of hashes of each array's values and their places: the same on every mesh, as integers add in any order."""

    def digest(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32) if leaf.dtype.itemsize == 4 else leaf.astype(jnp.uint32)
        for axis in range(leaf.ndim):
            stride = math.prod(leaf.shape[axis + 1 :])
            bits += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride * _GOLDEN % 2**32)
        for shift, factor in _MURMUR:
            bits = (bits ^ bits >> shift) * np.uint32(factor)
        return jnp.sum(bits ^ bits >> 16, dtype=jnp.uint32)

    return [digest(leaf) for leaf in jax.tree.leaves(state)]


def _digest(state: State) -> str:
    return "".join(f"{int(number):08x}" for number in jax.device_get(_digests(state)))


def _reason(error: Exception) -> str:
    """What went wrong, without the kilobytes of settings that TensorStore appends."""
    return re.split(r"\n| \[\w+(?:\[\d+\])?='", str(error).strip())[0]


def _overlook_abandoned_reads() -> None:
    """Orbax stops at the first array that cannot be read; Python would print a traceback for each that comes later."""
    report = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      run_dir: the run folder; `checkpoints/` is made in it.
      keep: how many of the newest are kept.
      keep_every: checkpoints at multiples of this stay for good; 0: none.
    """

    def __init__(self, run_dir: str | os.PathLike[str], keep: int, keep_every: int = 0) -> None:
        self._run_dir = Path(run_dir).absolute()
        self._manager = ocp.CheckpointManager(
            self._run_dir / DIRECTORY,
            item_handlers={name: handler() for name, handler in _ITEMS.items()},
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None),
        )

    def save(self, state: State, position: dict[str, Any]) -> None:
        """Starts saving `state` and the JSON-able data position as checkpoint `state["step"]`, unless it is there.

        Raises:
          UserError: the disk is full, now or while the checkpoint before was written.
        """
        step = int(state["step"])
        if step in self._manager.all_steps():
            return
        self._check_room(step, state)
        train = {name: value for name, value in state.items() if name != "ema"}
        with run_folder.written_to(self._run_dir):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    train=ocp.args.StandardSave(train),
                    ema=ocp.args.StandardSave(state["ema"]),
                    position=ocp.args.JsonSave(position | {"digest": _digest(state)}),
                ),
            )

    def _check_room(self, step: int, state: State) -> None:
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        needed, free = sum(leaf.nbytes for leaf in leaves), shutil.disk_usage(self._run_dir).free
        if needed > free:
            raise UserError(
                f"{self._run_dir}: checkpoint {step} needs up to {needed / 1e6:.1f} MB, the disk has "
                f"{free / 1e6:.1f} MB free; what the run saved before is kept. Make room and run again"
            )

    def restore(self, abstract: State) -> tuple[State, dict[str, Any]]:
        """State and data position of the newest checkpoint, on the shardings of `abstract`, whatever they were before.

        A checkpoint that cannot be read, or whose content is not what was saved, is passed over for the one before, and
        moved to `damaged/`; a warning names it.

        Raises:
          UserError: no checkpoint has the structure and shapes of `abstract`.
        """
        failures: dict[int, str] = {}
        _overlook_abandoned_reads()
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(step, abstract)
            except jax.errors.JaxRuntimeError:  # devices without room, say
                raise
            except Exception as error:  # of damaged files orbax and TensorStore raise all kinds, and plain ones
                restored, failures[step] = None, _reason(error)
            if jax.process_count() > 1:  # one that fails on any host fails on all
                everywhere = multihost_utils.process_allgather(np.array(restored is not None)).all()
                if restored is not None and not everywhere:
                    restored, failures[step] = None, "it cannot be read on another host"
            if restored is not None:
                self._move_aside(failures, step)
                return restored
        step, reason = next(iter(failures.items()))
        path = self._run_dir / DIRECTORY / str(step)
        raise UserError(
            f"{path} is damaged, or not of this model or this version of the code ({reason}), and no other checkpoint "
            "fits; put it back, or begin anew in another --workdir"
        )

    def _restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        train = {name: value for name, value in abstract.items() if name != "ema"}
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                train=ocp.args.StandardRestore(train),
                ema=ocp.args.StandardRestore(abstract["ema"]),
                position=ocp.args.JsonRestore(),
            ),
        )
        state, position = restored["train"] | {"ema": restored["ema"]}, restored["position"]
        if position.pop("digest") != _digest(state):
            raise ValueError("its content is not what was saved")
        return state, position

    def _move_aside(self, failures: dict[int, str], step: int) -> None:
        for damaged, reason in failures.items():
            path, aside = self._run_dir / DIRECTORY / str(damaged), self._run_dir / DAMAGED / str(damaged)
            warn(f"{path} is damaged ({reason}) and moved to {aside.parent}; the run goes on from checkpoint {step}")
            if jax.process_index() == 0:
                aside.parent.mkdir(exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        if failures:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints moved")
            self._manager.reload()

    def reached_preemption(self, step: int) -> bool:
        """In multi-process runs: whether any process was told to stop, agreed upon at this step."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          UserError: the disk is full.
        """
        with run_folder.written_to(self._run_dir):
            self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def latest(run_dir: str | os.PathLike[str]) -> int | None:
    """The number of updates of the newest complete checkpoint of a run; None if there is none."""
    directory = Path(run_dir).absolute() / DIRECTORY
    if not directory.is_dir():
        return None
    with ocp.CheckpointManager(
        directory, options=ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0)
    ) as manager:
        return manager.latest_step()


def load_ema(run_dir: str | os.PathLike[str]) -> tuple[str, Params]:
    """The part a run trains, and that part's EMA parameters (float32 numpy) in its newest checkpoint, adapters merged.

    Raises:
      UserError: the run has no checkpoint yet, or its newest is damaged.
    """
    from subtractive_jax.training.stages import PART_OF_STAGE  # which builds every model; saving needs none of it

    step = latest(run_dir)
    if step is None:
        raise UserError(f"{run_dir}: the run has no checkpoint yet; train it for longer")
    config = json.loads((Path(run_dir) / "config.json").read_text())
    path = Path(run_dir).absolute() / DIRECTORY / str(step) / "ema"
    _overlook_abandoned_reads()
    try:
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(path).item_metadata.tree
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            params = reader.restore(path, restore_args=arguments)
    except Exception as error:  # of damaged files orbax and TensorStore raise all kinds, and plain ones
        raise UserError(
            f"{path.parent} is damaged ({_reason(error)}); launch.train would go on from the checkpoint before: run it "
            "again"
        ) from error
    if lora.ENTRY in params:
        params = lora.merge(params, ml_collections.ConfigDict(config["train"]["lora"]))
    part = PART_OF_STAGE[config["stage"]]
    return part, params[part]
