"""A run's folder: its resolved config, the parts it inherits from its parent model, and what becomes of a full disk."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from subtractive_jax.errors import UserError

CONFIG = "config.json"
INHERITED = "inherited"
_BEING_WRITTEN = f".{CONFIG}"  # all there is in the folder of a run that was killed as it began

# What may differ when a run goes on: nothing that decides the parameters, up to the order of floating-point sums.
_FREE = {
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "remat",
    "mel_matching",
    "train.accumulation_steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_examples",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.preview_examples",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
_SET_BY_THE_RUN = {"latent_shift", "latent_scale", "context_scale"}  # when the config leaves them empty


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {name: leaf for key, value in values.items() for name, leaf in _flat(value, f"{prefix}{key}.").items()}


def differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """The fields (dotted) in which two configs, or two parts of configs, differ, with both values."""
    first, second = (_flat(json.loads(_json(config))) for config in (one, other))
    return {
        name: (first.get(name), second.get(name))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    }


def _json(config: Any) -> str:
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return json.dumps(values, indent=2)


def read_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict | None:
    """The config of the run in `workdir`, or None where a new run may begin.

    Raises:
      UserError: `workdir` is something else than a run folder or an empty folder.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file; give a folder for the run as --workdir")
    if not workdir.is_dir() or {path.name for path in workdir.iterdir()} <= {_BEING_WRITTEN}:
        return None
    path = workdir / CONFIG
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): put it back, or give another --workdir") from error
    if "stage" not in config or "format" in config:
        raise UserError(f"{workdir} exists and is not a run folder; give a new or empty folder as --workdir")
    return ml_collections.ConfigDict(config)


def check_unchanged(
    workdir: str | os.PathLike[str], saved: ml_collections.ConfigDict, given: ml_collections.ConfigDict
) -> None:
    """Raises UserError, naming the field and both values, if the run would go on with another config."""
    for name, (before, now) in differences(saved, given).items():
        extends = name == "train.steps" and given.train.schedule == "constant"
        if name in _FREE or extends or (name in _SET_BY_THE_RUN and not now):
            continue
        raise UserError(
            f"{workdir} was trained with config.{name}={before}, now it is {now}; "
            "go on with the old value, or give another --workdir"
        )


def adopt_scales(config: ml_collections.ConfigDict, saved: ml_collections.ConfigDict) -> None:
    """Takes over what the run set when it began."""
    with config.unlocked():
        config.update({name: tuple(saved[name]) for name in _SET_BY_THE_RUN})


def write_config(workdir: str | os.PathLike[str], config: ml_collections.ConfigDict) -> None:
    """Writes `config.json`, and makes the folder if need be."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / _BEING_WRITTEN
    temporary.write_text(_json(config) + "\n")
    os.replace(temporary, workdir / CONFIG)


@contextlib.contextmanager
def written_to(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Makes a `UserError` of what a full disk, or one that may not be written to, raises in the block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of orbax and safetensors all kinds
        reason = _refusal(error)
        if not reason:
            raise
        where = getattr(error, "filename", None) or workdir
        raise UserError(
            f"{where}: {reason}; what the run saved before is kept. Make room, or give the right to write there, and "
            "run again"
        ) from error


def _refusal(error: Exception) -> str:
    """Why the file system took no more; empty if that is not what went wrong."""
    number = getattr(error, "errno", None)
    if number in _FULL + _FORBIDDEN:
        return os.strerror(number)
    return next((os.strerror(full) for full in _FULL if os.strerror(full) in str(error)), "")
