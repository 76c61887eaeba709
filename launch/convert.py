"""Published weights to a model folder and back, a run to a model folder, and the weights of evaluation's networks.

python -m launch.convert --from=KIND --input=DIR --output=MODEL [--config=configs/X.py] [--widen]
    KIND: stable-diffusion, riffusion, auffusion or instruct-pix2pix, folders in diffusers' layout
python -m launch.convert --from=KIND --input=DIR --into=MODEL --output=MODEL
    KIND: t5, flan-t5, clip-text or hifigan, to replace a part of a model
python -m launch.convert --to=diffusers --input=MODEL --output=DIR
python -m launch.convert --from=run --input=RUN --output=MODEL [--dtype=float32] [--card=MODEL_CARD.md] [--shares=tiny]
python -m launch.convert --from=KIND --input=FILE_OR_DIR [--output=KIND.safetensors]
    KIND: an embedder of launch.evaluate: musicnn (reads the installed wheel, no --input), vggish
    (vggish-10086976.pth), panns-cnn14-16k (Cnn14_16k_mAP=0.438.pth) or clap (a folder in transformers' layout,
    without fusion); written where launch.evaluate looks for it, or to --output for its --embedder_weights
"""

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import auffusion, riffusion
from launch import pickles, program
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.evaluation.embedders import clap, musicnn, panns, published, vggish
from subtractive_jax.evaluation.embedders.embedding import installed_weights
from subtractive_jax.weights import diffusers_layout, export, model_folder, replace
from subtractive_jax.weights.model_folder import ModelFiles
from subtractive_jax.weights.published import Published

# What each kind takes besides --input and --output.
_FAMILY = {
    "stable-diffusion": ("config", "widen"),
    "riffusion": ("config", "widen"),
    "auffusion": ("config", "widen"),
    "instruct-pix2pix": ("config",),
}
_TEXT_ENCODERS = {"t5": "t5", "flan-t5": "t5", "clip-text": "clip_text_model"}
_KINDS = {
    "run": ("dtype", "card", "shares"),
    **{kind: (*takes, "dtype", "card") for kind, takes in _FAMILY.items()},
    **dict.fromkeys((*_TEXT_ENCODERS, "hifigan"), ("into", "dtype", "card")),
    **dict.fromkeys((musicnn.NAME, vggish.NAME, panns.NAME, clap.NAME), ()),
}
_EMBEDDERS = {vggish.NAME: published.torchvggish, panns.NAME: published.cnn14, clap.NAME: published.clap_folder}

_FROM = flags.DEFINE_string("from", None, f"What to convert: {', '.join(_KINDS)}.")
_TO = flags.DEFINE_string("to", None, "What to convert a model to: diffusers.")
_INPUT = flags.DEFINE_string("input", None, "The folder to read: published weights, a run, or (with --to) a model.")
_OUTPUT = flags.DEFINE_string("output", None, "Where to write; must not exist.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What a published folder does not say; default: configs/auffusion.py or configs/riffusion.py."
)
_INTO = flags.DEFINE_string("into", None, "The model to copy with one part replaced.")
_WIDEN = flags.DEFINE_bool("widen", False, "Add a denoiser that reads the context too, and ignores it until trained.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float16", "bfloat16", "float32"],
    "How parameters are stored; encoders rounded to 16 bits no longer match latents made before.",
)
_CARD = flags.DEFINE_string("card", None, "A model card to put into the model folder; a stub otherwise.")
_SHARES = flags.DEFINE_string("shares", None, "A shipped model whose parts, where they are the same, are left out.")

_OF_TRAINING = ("loss", "mesh", "remat", "train")  # fields that a model can do without
_MUSICNN_LAYERS = ("batch_normalization", "conv2d", "dense")  # first letters of the network's variables


def card_stub(name: str, files: ModelFiles, origin: str = "") -> str:
    """What can be said about a model from its files alone."""
    config = files.config
    parts = "\n".join(f"- `{part}`" for part in sorted(files.params))
    return f"""# {name}

Config `{config.name}`, stage `{config.stage}`, target `{config.target}`, stems {", ".join(config.data.stems)}.
{origin}
Parts:

{parts}

Data, licence and figures: not stated yet.
"""


def _base_config(kind: str, source: Published) -> ConfigDict:
    """What the folder does not say: --config, else the config an exported folder holds, else the kind's own."""
    if _CONFIG.value is not None:
        return _CONFIG.value
    if source.has(diffusers_layout.OWN_CONFIG):
        file = source.path / diffusers_layout.OWN_CONFIG
        own = model_folder.read_config(file)
        missing = [name for name in riffusion.get_config() if name not in own and name not in _OF_TRAINING]
        if missing:
            raise UserError(f"{file}: the fields {', '.join(missing)} are missing; restore it, or delete it")
        return own
    return (auffusion if kind == "auffusion" else riffusion).get_config()


def _read(kind: str, folder: Path) -> ModelFiles:
    """The model that --from, --input and the flags they take describe."""
    if kind == "run":
        files = model_folder.load(folder)
        files.config.init_from = ""  # a path of the machine that trained it
        return files
    source = Published(folder, pickles.read)
    if kind in _FAMILY:
        part = "denoiser" if kind == "instruct-pix2pix" else "base_denoiser"
        files = diffusers_layout.read(source, _base_config(kind, source), part)
        return diffusers_layout.widen(files) if _WIDEN.value else files
    if not _INTO.value:
        raise UserError(f"--from={kind} is a part of a model: name the model to copy with --into=MODEL")
    files = model_folder.load(_INTO.value)
    if kind == "hifigan":
        return replace.vocoder(files, source)
    return replace.text_encoder(files, source, _TEXT_ENCODERS[kind])


def from_kind(kind: str) -> dict[str, str]:
    """Writes a model folder from a run or from published weights."""
    if _CARD.value and not Path(_CARD.value).is_file():
        raise UserError(f"--card={_CARD.value}: no such file")
    folder, path = _folders(f"--from={kind}")
    files = _read(kind, folder)
    origin = "" if kind == "run" else f"\nConverted from `{folder.name}` ({kind}), whose licence still holds.\n"
    card = Path(_CARD.value).read_text() if _CARD.value else card_stub(path.name, files, origin)
    model_folder.save(path, files, dtype=_DTYPE.value, card=card, shares=_SHARES.value or "")
    done = {"from": kind, "output": str(path)}
    if kind in _TEXT_ENCODERS and files.config.denoiser.condition_dim:
        done["note"] = "the condition adapter is untrained: train the base stage from this model before any other"
    return done


def to_diffusers() -> dict[str, str]:
    """Writes a folder in diffusers' layout from a model or a run."""
    folder, path = _folders("--to=diffusers")
    export.save(path, model_folder.load(folder))
    return {"to": "diffusers", "output": str(path)}


def _refuse_flags(job: str, takes: tuple[str, ...]) -> None:
    """Raises UserError for flags that would have no effect."""
    given = {
        "config": _CONFIG.value is not None,
        "into": _INTO.present,
        "widen": _WIDEN.value,
        "dtype": _DTYPE.present,
        "card": _CARD.present,
        "shares": _SHARES.present,
    }
    for flag, is_given in given.items():
        if is_given and flag not in takes:
            raise UserError(f"{job} takes no --{flag}")


def _folders(job: str) -> tuple[Path, Path]:
    """--input and --output."""
    if not _INPUT.value or not _OUTPUT.value:
        raise UserError(f"{job} needs --input, the folder to read, and --output, the folder to write")
    output = Path(_OUTPUT.value)
    if output.exists():  # said before gigabytes are read
        raise UserError(f"{output} exists: give another --output, or remove it")
    return Path(_INPUT.value), output


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


def from_embedder(kind: str) -> dict[str, str]:
    """Writes an embedder's weights, where `launch.evaluate` looks for them unless told otherwise."""
    path = Path(_OUTPUT.value) if _OUTPUT.value else installed_weights(kind)
    if _OUTPUT.value and path.exists():
        raise UserError(f"{path} exists: give another --output")
    if kind == musicnn.NAME:
        if _INPUT.value:
            raise UserError("--from=musicnn reads the installed wheel and takes no --input")
        tensors, metadata = read_musicnn(), {"source": "musicnn 0.1.0 MTT_musicnn, ISC licence"}
    else:
        if not _INPUT.value:
            raise UserError(f"--from={kind} needs --input, the published weights; --help says which")
        tensors, metadata = _EMBEDDERS[kind](Path(_INPUT.value), pickles.read)
        metadata |= {"source": Path(_INPUT.value).name}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safetensors.numpy.save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"from": kind, "output": str(path)}


def main() -> None:
    kind, target = _FROM.value, _TO.value
    if (kind is None) == (target is None):
        raise UserError("give either --from=KIND or --to=diffusers; --help lists the kinds")
    if kind is None:
        if target != "diffusers":
            raise unknown_name("--to", str(target), ("diffusers",))
        _refuse_flags("--to=diffusers", ())
        done = to_diffusers()
    elif kind not in _KINDS:
        raise unknown_name("--from", kind, _KINDS)
    else:
        _refuse_flags(f"--from={kind}", _KINDS[kind])
        done = from_embedder(kind) if kind in (musicnn.NAME, *_EMBEDDERS) else from_kind(kind)
    print(json.dumps(done))


if __name__ == "__main__":
    program.run(main)
