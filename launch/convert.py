"""Writes a model folder from a run, or the evaluation network's weights from the wheel they come in.

python -m launch.convert --from=run --input=RUN --output=MODEL [--dtype=float32] [--card=MODEL_CARD.md]
python -m launch.convert --from=musicnn [--output=musicnn.safetensors]
"""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
from absl import flags

from launch import program
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.evaluation import embedders
from subtractive_jax.weights import model_folder

_FROM = flags.DEFINE_string("from", None, "What to convert: run or musicnn.", required=True)
_INPUT = flags.DEFINE_string("input", None, "The run folder (with --from=run).")
_OUTPUT = flags.DEFINE_string("output", None, "Where to write; must not exist.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float16", "bfloat16", "float32"],
    "How parameters are stored; encoders rounded to 16 bits no longer match latents made before.",
)
_CARD = flags.DEFINE_string("card", None, "A model card to put into the model folder; a stub otherwise.")

_MUSICNN_LAYERS = ("batch_normalization", "conv2d", "dense")  # first letters of the network's variables


def card_stub(name: str, files: model_folder.ModelFiles) -> str:
    """What can be said about a model from its files alone."""
    config = files.config
    parts = "\n".join(f"- `{part}`" for part in sorted(files.params))
    return f"""# {name}

Config `{config.name}`, stage `{config.stage}`, target `{config.target}`, stems {", ".join(config.data.stems)}.

Parts:

{parts}

Data, licence and figures: not stated yet.
"""


def from_run(output: str | None) -> Path:
    """Writes the model folder of a run: EMA parameters of the newest checkpoint, inherited parts as they are."""
    if not _INPUT.value or not output:
        raise UserError("--from=run needs --input=RUN and --output=MODEL")
    files = model_folder.load(_INPUT.value)
    files.config.init_from = ""  # a path of the machine that trained it
    path = Path(output)
    if _CARD.value and not Path(_CARD.value).is_file():
        raise UserError(f"--card={_CARD.value}: no such file")
    card = Path(_CARD.value).read_text() if _CARD.value else card_stub(path.name, files)
    model_folder.save(path, files, dtype=_DTYPE.value, card=card)
    return path


def read_musicnn() -> dict[str, np.ndarray]:
    """The MagnaTagATune checkpoint inside the `musicnn` wheel, without the optimizer's variables.

    Raises:
      UserError: the wheel or TensorFlow is not installed.
    """
    package = importlib.util.find_spec("musicnn")  # found, not imported: its imports are of 2019
    if package is None or package.origin is None:
        raise UserError("musicnn is not installed: `pip install --no-deps musicnn==0.1.0`")
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "reading a TensorFlow checkpoint needs the extra `convert`: pip install 'subtractive-jax[convert]'"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    folder = Path(package.origin).parent / "MTT_musicnn"
    with tempfile.TemporaryDirectory() as temporary:
        for suffix in (".index", ".data-00000-of-00001"):  # stored without a prefix, which the reader needs
            shutil.copyfile(folder / suffix, f"{temporary}/model{suffix}")
        reader = tf.train.load_checkpoint(f"{temporary}/model")
        names = [name for name in reader.get_variable_to_shape_map() if name.split("/")[0].startswith(_MUSICNN_LAYERS)]
        return {name: reader.get_tensor(name) for name in sorted(names) if "/Adam" not in name}


def from_musicnn(output: str | None) -> Path:
    """Writes the checkpoint as safetensors, where `launch.evaluate` looks for it unless told otherwise."""
    if _INPUT.value:
        raise UserError("--from=musicnn reads the installed wheel and takes no --input")
    path = Path(output) if output else embedders.MUSICNN_FILE
    if output and path.exists():
        raise UserError(f"{path} exists: give another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.numpy.save_file(
        read_musicnn(), temporary, metadata={"source": "musicnn 0.1.0 MTT_musicnn, ISC licence"}
    )
    os.replace(temporary, path)
    return path


KINDS: dict[str, Callable[[str | None], Path]] = {"run": from_run, "musicnn": from_musicnn}


def main() -> None:
    kind = _FROM.value
    if kind not in KINDS:
        raise unknown_name("--from", kind, KINDS)
    print(json.dumps({"from": kind, "output": str(KINDS[kind](_OUTPUT.value))}))


if __name__ == "__main__":
    program.run(main)
