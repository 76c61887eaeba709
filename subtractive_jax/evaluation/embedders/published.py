"""Published weight files of embedders to what `load_embedder` reads: arrays under their own names, and metadata."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from subtractive_jax.errors import UserError
from subtractive_jax.evaluation.embedders import clap, panns, vggish
from subtractive_jax.evaluation.embedders.embedding import check_shapes
from subtractive_jax.weights.published import Published

Weights = tuple[dict[str, np.ndarray], dict[str, str]]
ReadPickle = Callable[..., dict[str, np.ndarray]]  # (path, within="") -> tensors by name


def torchvggish(path: Path, read_pickle: ReadPickle) -> Weights:
    """`vggish-10086976.pth` of harritaylor/torchvggish."""
    return _checked(path, _read(path, read_pickle), vggish.shapes()), {}


def cnn14(path: Path, read_pickle: ReadPickle) -> Weights:
    """`Cnn14_16k_mAP=0.438.pth` of PANNs, whose training state is left out."""
    return _checked(path, _read(path, read_pickle, within="model"), panns.shapes()), {}


def clap_folder(path: Path, read_pickle: ReadPickle) -> Weights:
    """A folder of CLAP in transformers' layout, such as `laion/larger_clap_music`.

    Raises:
      UserError: files are missing or damaged, or the model is of another architecture (fusion).
    """
    source = Published(path, read_pickle)
    published = source.config("config.json")
    front_end = source.config("preprocessor_config.json")
    tensors = source.tensors(".", ("model", "pytorch_model"))
    tokenizer = None
    if source.has("tokenizer.json"):
        try:
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            source.note("tokenizer.json", f"damaged ({error})")
    else:
        source.note("tokenizer.json", "missing")
    source.check()
    assert published is not None and front_end is not None and tensors is not None and tokenizer is not None
    try:
        config = clap.read_config(published, front_end)
    except UserError as error:
        raise UserError(f"{path} cannot be converted: {error}") from error
    check_shapes(str(path), tensors, config.shapes())
    floats = {name: tensor for name, tensor in tensors.items() if np.issubdtype(tensor.dtype, np.floating)}
    return floats, {"config": config.to_json(), "tokenizer": tokenizer.to_str()}


def _read(path: Path, read_pickle: ReadPickle, within: str = "") -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the published weight file as --input")
    try:
        return read_pickle(path, within)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _checked(
    path: Path, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    check_shapes(str(path), tensors, shapes)
    return {name: tensors[name] for name in shapes}
