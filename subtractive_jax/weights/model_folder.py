"""Model folders: what is exported, shipped and inherited from one training stage to the next.

config.json             the resolved config, the format's number, and what the folder has from a shipped model
<part>.safetensors      one file a part (`parts.PARTS`), PyTorch names and layout
tokenizer/tokenizer.json
MODEL_CARD.md
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from subtractive_jax import parts
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models.network import Params
from subtractive_jax.weights.torch_layout import from_torch, to_torch

FORMAT = 1
_CONFIG = "config.json"
_TOKENIZER = Path("tokenizer") / "tokenizer.json"
_FILES = {**{part: Path(f"{part}.safetensors") for part in parts.PARTS}, "tokenizer": _TOKENIZER}
_CARD = "MODEL_CARD.md"
_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_SHIPPED = Path(__file__).parents[1] / "shipped"


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model as its folder holds it: the resolved config, parameters by part, and the tokenizer, if it has one."""

    config: ConfigDict
    params: dict[str, Params]
    tokenizer: Tokenizer | None = None


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a model: an existing folder as it is, otherwise that of the shipped model with this name.

    Raises:
      UserError: neither exists.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    shipped = _shipped()
    if str(name_or_path) not in shipped:
        raise unknown_name("model folder, run folder or shipped model", str(name_or_path), shipped)
    return shipped[str(name_or_path)]


def _shipped() -> dict[str, Path]:
    return {folder.name: folder for folder in _SHIPPED.iterdir() if (folder / _CONFIG).is_file()}


def load(name_or_path: str | os.PathLike[str]) -> ModelFiles:
    """A model folder's parts, or a run folder's: those it inherits and the EMA of what it trains. All float32.

    Raises:
      UserError: there is no such model, a file is missing or damaged or does not fit the config, or the run has no
        checkpoint yet.
    """
    path = resolve(name_or_path)
    config = _read_config(path)
    if "format" not in config:
        return _load_run(path, config)
    if config["format"] != FORMAT:
        raise UserError(
            f"{path / _CONFIG}: format {config['format']}, this version reads format {FORMAT}: use the version that "
            "wrote the folder, or export its run again with launch.convert of this one"
        )
    del config["format"]
    files = {name: path / file for name, file in _FILES.items()}
    if "shares" in config:
        files |= _shared_files(path / _CONFIG, config.shares)
        del config["shares"]
    params = {part: _load_part(files[part], part, config) for part in parts.PARTS if files[part].is_file()}
    return ModelFiles(config, params, _load_tokenizer(files["tokenizer"]))


def save(
    path: str | os.PathLike[str], files: ModelFiles, dtype: str = "float16", *, card: str, shares: str = ""
) -> None:
    """Writes a model folder, whole or not at all.

    Args:
      path: must not exist.
      dtype: how parameters are stored: float16, bfloat16 or float32.
      card: the text of MODEL_CARD.md.
      shares: a shipped model; parts that it holds with the same values, and the same tokenizer, are not written.

    Raises:
      UserError: `path` exists, an unknown part, dtype or shipped model, or parameters that are not finite in `dtype`.
    """
    if dtype not in _DTYPES:
        raise unknown_name("dtype", dtype, _DTYPES)
    shipped = _shipped()
    if shares and shares not in shipped:
        raise unknown_name("shipped model", shares, shipped)
    with new_folder(path) as temporary:
        for part, params in files.params.items():
            if part not in parts.PARTS:
                raise unknown_name("part", part, parts.PARTS)
            tensors = {name: _narrowed(part, name, tensor, dtype) for name, tensor in to_torch(params).items()}
            safetensors.numpy.save_file(tensors, temporary / f"{part}.safetensors", {"format": "pt"})
        if files.tokenizer is not None:
            (temporary / _TOKENIZER).parent.mkdir()
            files.tokenizer.save(str(temporary / _TOKENIZER))
        head: dict[str, Any] = {"format": FORMAT}
        if shares:
            head["shares"] = {"model": shares, "sha256": _remove_shared(temporary, shipped[shares])}
        (temporary / _CARD).write_text(card)
        config = json.dumps({**head, **files.config.to_dict()}, indent=2)
        (temporary / _CONFIG).write_text(f"{config}\n")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _remove_shared(folder: Path, shared: Path) -> dict[str, str]:
    """Removes files of `folder` that are in `shared`, byte for byte; returns their hashes by the names of `_FILES`."""
    removed = {}
    for name, file in _FILES.items():
        own, other = folder / file, shared / file
        if own.is_file() and other.is_file() and (digest := _sha256(own)) == _sha256(other):
            removed[name] = digest
            own.unlink()
    if "tokenizer" in removed:
        (folder / _TOKENIZER.parent).rmdir()
    return removed


def _shared_files(origin: Path, shares: Any) -> dict[str, Path]:
    """The files that a folder's config takes from a shipped model."""
    if not isinstance(shares, ConfigDict) or not isinstance(shares.get("sha256"), ConfigDict) or "model" not in shares:
        raise UserError(f'{origin}: "shares" must be {{"model": NAME, "sha256": {{PART: DIGEST, ...}}}}')
    shipped = _shipped()
    if shares.model not in shipped:
        raise UserError(f'{origin}: shares parts with "{shares.model}", and no such model is shipped')
    if unknown := set(shares.sha256) - set(_FILES):
        raise unknown_name(f"shared part in {origin}", min(unknown), _FILES)
    files = {name: shipped[shares.model] / _FILES[name] for name in shares.sha256}
    for name, file in files.items():
        if not file.is_file() or _sha256(file) != shares.sha256[name]:
            raise UserError(f"{origin}: {file} is not the {name} that the model was exported with: export it again")
    return files


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when all is written and vanishes if anything fails.

    Raises:
      UserError: `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists: give another folder, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are their owner's alone
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _narrowed(part: str, name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = tensor.astype(_DTYPES[dtype], copy=False)
    if not np.isfinite(narrow.astype(np.float32, copy=False)).all():
        raise UserError(f"{part}: {name} has values that {dtype} cannot hold; try bfloat16 or float32, or train again")
    return narrow


def _read_config(path: Path) -> ConfigDict:
    file = path / _CONFIG
    if not file.is_file():
        raise UserError(f"{path} is neither a model folder nor a run folder: it has no {_CONFIG}")
    return read_config(file)


def read_config(file: Path) -> ConfigDict:
    """A resolved config from its JSON.

    Raises:
      UserError: it is not valid JSON, or no object.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    try:
        return ConfigDict(_with_tuples(content))
    except ValueError as error:
        raise UserError(f"{file}: not a config ({error})") from error


def _with_tuples(value: Any) -> Any:
    """JSON has only lists; configs have only tuples."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _load_part(file: Path, part: str, config: ConfigDict) -> Params:
    try:
        tensors = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged ({error})") from error
    try:
        return from_torch(tensors, parts.network(part, config).shapes())
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _load_tokenizer(file: Path) -> Tokenizer | None:
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{file}: damaged ({error})") from error


def _load_run(path: Path, config: ConfigDict) -> ModelFiles:
    from subtractive_jax.training.checkpoint import load_ema  # orbax takes seconds to import; model folders need none

    part, trained = load_ema(path)
    inherited = load(path / "inherited")
    return ModelFiles(config, {**inherited.params, part: trained}, inherited.tokenizer)
