"""Model folders in published layouts: configs and weights as their files hold them, all complaints collected.

Weights are `<stem>.safetensors`, or shards listed in `<stem>.safetensors.index.json`; where there are none, `.bin` and
`.pt` files, which are pickles: the caller supplies what reads them. Variants rounded to float16 come last.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes  # noqa: F401  so that numpy knows bfloat16
import numpy as np
import safetensors
import safetensors.numpy
from ml_collections import ConfigDict

from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.models.network import Params
from subtractive_jax.weights.torch_layout import from_torch

Tensors = dict[str, np.ndarray]
ReadPickle = Callable[[Path], Tensors]  # names of nested dicts joined by dots; raises UserError

_SUFFIXES = (".safetensors", ".bin", ".pt", ".fp16.safetensors", ".fp16.bin")
_INDEX = ".index.json"


@dataclasses.dataclass(frozen=True)
class Fields:
    """What a published config may say.

    Attributes:
      taken: fields that become ours, each with the published class's default, which also shows its type.
      fixed: fields that are not implemented, each with the one value that is: the published class's default, where a
        file leaves it out.
      ignored: fields that say nothing about what is computed.
      per_block: fields of `taken` that may be given once or as a list.
    """

    taken: Mapping[str, Any]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: Collection[str] = ()
    per_block: Collection[str] = ()


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, tuple):
        return isinstance(value, tuple) and bool(value) and all(_is_like(item, example[0]) for item in value)
    if isinstance(example, bool) or isinstance(value, bool):
        return type(value) is type(example)
    if isinstance(example, int):
        return isinstance(value, int) and (value > 0 or example == 0)
    if isinstance(example, float):
        return isinstance(value, int | float) and abs(value) < math.inf and (value != 0 or example == 0)
    return isinstance(value, type(example))


class Published:
    """A published model folder that is being read.

    What is wrong with it is noted rather than raised, so that it can be told all at once: `check` raises.

    Args:
      path: the folder.
      read_pickle: reads `.bin` and `.pt` files.

    Raises:
      UserError: there is no such folder.
    """

    def __init__(self, path: Path, read_pickle: ReadPickle):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give the folder that holds the published files")
        self.path = path
        self._read_pickle = read_pickle
        self._problems: list[str] = []

    def note(self, where: str, what: str) -> None:
        """Notes what is wrong with the file or folder `where`, relative to this folder."""
        name = str(PurePosixPath(where))
        self._problems.append(f"{self.path.name if name == '.' else name}: {what}")

    def check(self) -> None:
        """Raises a `UserError` that names everything noted so far."""
        if self._problems:
            raise UserError(f"{self.path} cannot be converted: {'; '.join(self._problems)}")

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def json(self, name: str) -> Any:
        """A JSON file's content; None, and a note, where there is none."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.note(name, "missing")
        except (OSError, ValueError, RecursionError) as error:
            self.note(name, f"not valid JSON ({error})")
        return None

    def config(self, name: str) -> dict[str, Any] | None:
        """A JSON file that holds one object."""
        content = self.json(name)
        if content is not None and not isinstance(content, dict):
            self.note(name, "not a JSON object")
            return None
        return content

    def fields(self, name: str, content: Mapping[str, Any], known: Fields, strict: bool = True) -> dict[str, Any]:
        """The `known.taken` fields of a config; notes those whose value is not implemented.

        Args:
          strict: fields that `known` does not name must be null or false.
        """
        taken = {}
        for key, default in known.taken.items():
            value = _tuples(content.get(key, default))
            per_block = key in known.per_block and _is_like(value, (default,))
            if not per_block and not _is_like(value, default):
                self.note(name, f"another architecture: {key} is {content[key]!r}")
                value = default
            taken[key] = value
        for key, value in content.items():
            if key in known.fixed:
                accepted = value == known.fixed[key]
            else:
                is_ours = key in known.taken or key in known.ignored or key.startswith("_")
                accepted = is_ours or not strict or value is None or value is False
            if not accepted:
                self.note(name, f"another architecture: {key} is {value!r}")
        return taken

    def tensors(self, folder: str, stems: Sequence[str], names: Sequence[str] = ()) -> Tensors | None:
        """The tensors of a component, by their published names; None, and a note, where they cannot be read.

        Args:
          stems: what the weight file may be called, without its suffix.
          names: pickles that have no suffix.
        """
        where = self.path / folder
        for suffix in _SUFFIXES:
            for stem in stems:
                if (where / f"{stem}{suffix}").is_file():
                    return self._file(f"{folder}/{stem}{suffix}")
                if (where / f"{stem}{suffix}{_INDEX}").is_file():
                    return self._shards(folder, f"{folder}/{stem}{suffix}{_INDEX}")
        for name in names:
            return self._file(f"{folder}/{name}")
        self.note(folder, f"no weights (looked for {', '.join(stems)} as .safetensors, .bin or .pt)")
        return None

    def _file(self, name: str) -> Tensors | None:
        path = self.path / name
        try:
            if path.suffix == ".safetensors":
                return safetensors.numpy.load_file(path)
            return self._read_pickle(path)
        except UserError as error:
            self.note(name, str(error))
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            self.note(name, f"damaged ({error})")
        return None

    def _shards(self, folder: str, index: str) -> Tensors | None:
        content = self.config(index)
        if content is None:
            return None
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            self.note(index, "no weight_map")
            return None
        tensors: Tensors = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or not (self.path / folder / shard).is_file():
                self.note(index, f'no file "{shard}" beside it')
                return None
            part = self._file(f"{folder}/{shard}")
            if part is None:
                return None
            tensors.update(part)
        return tensors

    def params(self, folder: str, part: str, config: ConfigDict, tensors: Tensors) -> Params:
        """The parameters of `part` from its tensors; notes every name and shape that does not fit."""
        try:
            return from_torch(tensors, parts.network(part, config).shapes())
        except UserError as error:
            self.note(folder, str(error))
            return {}
