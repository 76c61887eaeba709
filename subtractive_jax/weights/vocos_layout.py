"""Vocos generators in exported folders: a JSON file of our fields, and tensors with the names of gemelo-ai/vocos."""

from typing import Any

from ml_collections import ConfigDict

from subtractive_jax.models.network import Params
from subtractive_jax.weights.published import Fields, Published, Tensors
from subtractive_jax.weights.torch_layout import to_torch

MODEL_TYPE = "vocos"
_FIELDS = Fields(  # with the values of its published mel model
    taken=dict(num_mels=100, dim=512, intermediate_dim=1536, num_layers=8, n_fft=1024, hop_length=256),
    fixed=dict(model_type=MODEL_TYPE),
)
_WEIGHTS = "vocoder"


def read_config(source: Published, folder: str, content: dict[str, Any], representation: ConfigDict) -> dict[str, Any]:
    """`config.vocoder` from the content of its `config.json`; notes whatever does not fit `representation`."""
    file = f"{folder}/config.json"
    fields = source.fields(file, content, _FIELDS)
    for ours, theirs in (("num_mels", "n_mels"), ("hop_length", "hop_length")):
        if fields[ours] != representation[theirs]:
            source.note(file, f"{ours} {fields[ours]}, but the model's representation has {representation[theirs]}")
    return {"model_type": MODEL_TYPE, **fields}


def read_tensors(source: Published, folder: str) -> Tensors | None:
    """The generator's tensors."""
    return source.tensors(folder, (_WEIGHTS,))


def to_published(config: ConfigDict, params: Params) -> tuple[dict[str, Any], Tensors, str]:
    """The config, tensors and name of the weight file."""
    return config.vocoder.to_dict(), to_torch(params), _WEIGHTS
