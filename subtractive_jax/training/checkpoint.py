"""Checkpoints of a run: orbax, asynchronous, named after the number of updates done. The only file that knows orbax."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from subtractive_jax.errors import UserError
from subtractive_jax.models.network import Params
from subtractive_jax.training.state import State

DIRECTORY = "checkpoints"
_ITEMS = {  # kept apart, so that sampling reads no optimizer state
    "train": ocp.StandardCheckpointHandler,
    "ema": ocp.StandardCheckpointHandler,
    "position": ocp.JsonCheckpointHandler,
}


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      run_dir: the run folder; `checkpoints/` is made in it.
      keep: how many of the newest are kept.
    """

    def __init__(self, run_dir: str | os.PathLike[str], keep: int) -> None:
        self._directory = Path(run_dir).absolute() / DIRECTORY
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers={name: handler() for name, handler in _ITEMS.items()},
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        )

    def save(self, state: State, position: dict[str, Any]) -> None:
        """Starts saving `state` and the JSON-able data position as checkpoint `state["step"]`, unless it is there."""
        step = int(state["step"])
        if step in self._manager.all_steps():
            return
        train = {name: value for name, value in state.items() if name != "ema"}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                train=ocp.args.StandardSave(train),
                ema=ocp.args.StandardSave(state["ema"]),
                position=ocp.args.JsonSave(position),
            ),
        )

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """State and data position of checkpoint `step`, onto the shardings of `abstract`, whatever they were before.

        Raises:
          UserError: the checkpoint does not have the structure or shapes of `abstract`.
        """
        train = {name: value for name, value in abstract.items() if name != "ema"}
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    train=ocp.args.StandardRestore(train),
                    ema=ocp.args.StandardRestore(abstract["ema"]),
                    position=ocp.args.JsonRestore(),
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            path = self._directory / str(step)
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path}: not a checkpoint of this model or this version of the code ({reason})") from error
        return restored["train"] | {"ema": restored["ema"]}, restored["position"]

    def reached_preemption(self, step: int) -> bool:
        """In multi-process runs: whether any process was told to stop, agreed upon at this step."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits until everything is written."""
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
    """The part a run trains, and that part's EMA parameters (float32 numpy) in its newest checkpoint.

    Raises:
      UserError: the run has no checkpoint yet.
    """
    from subtractive_jax.training.stages import PART_OF_STAGE  # which builds every model; saving needs none of it

    step = latest(run_dir)
    if step is None:
        raise UserError(f"{run_dir}: the run has no checkpoint yet; train it for longer")
    stage = json.loads((Path(run_dir) / "config.json").read_text())["stage"]
    path = Path(run_dir).absolute() / DIRECTORY / str(step) / "ema"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        params = reader.restore(path, restore_args=arguments)
    part = PART_OF_STAGE[stage]
    return part, params[part]
