"""HiFi-GAN generators in published layouts: github.com/jik876/hifi-gan's, and transformers' `SpeechT5HifiGan`."""

import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from subtractive_jax.models.network import Params
from subtractive_jax.weights.published import Fields, Published, Tensors
from subtractive_jax.weights.torch_layout import to_torch

_SHAPE: dict[str, Any] = dict(  # both layouts' names
    upsample_initial_channel=512,
    upsample_rates=(8, 8, 2, 2),
    upsample_kernel_sizes=(16, 16, 4, 4),
    resblock_kernel_sizes=(3, 7, 11),
    resblock_dilation_sizes=((1, 3, 5), (1, 3, 5), (1, 3, 5)),
)
_ORIGINAL = Fields(taken=dict(_SHAPE, num_mels=80, resblock="1"))
_SPEECHT5 = Fields(
    taken=dict(_SHAPE, upsample_rates=(4,) * 4, upsample_kernel_sizes=(8,) * 4, model_in_dim=80),
    fixed=dict(leaky_relu_slope=0.1),
)
_SPEECHT5_TYPES = ("speecht5_hifigan", "hifigan")  # the second before transformers 5, as all that is published
# What the vocoder was trained on: its config's names, and ours for the same.
_HEARS = dict(
    sampling_rate="sample_rate", hop_size="hop_length", n_fft="n_fft", win_size="win_length", fmin="fmin", fmax="fmax"
)
_CHECKPOINTS = ("g_????????", "generator_v?")  # pickles without a suffix, as trained and as published
_WEIGHT_NORMS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


def read_config(
    source: Published, folder: str, content: dict[str, Any], representation: ConfigDict
) -> dict[str, Any] | None:
    """`config.vocoder` from the content of its `config.json`; notes whatever does not fit `representation`."""
    file = f"{folder}/config.json"
    if content.get("model_type") in _SPEECHT5_TYPES:
        fields = source.fields(file, content, _SPEECHT5, strict=False)
        fields.update(num_mels=fields.pop("model_in_dim"), resblock="1")
    else:
        fields = source.fields(file, content, _ORIGINAL, strict=False)
    for one, other in (("rates", "kernel_sizes"), ("kernel_sizes", "dilation_sizes")):
        stage = "upsample" if one == "rates" else "resblock"
        if len(fields[f"{stage}_{one}"]) != len(fields[f"{stage}_{other}"]):
            source.note(file, f"{stage}_{one} and {stage}_{other} differ in length")
            return None
    heard = {ours: content[theirs] for theirs, ours in _HEARS.items() if content.get(theirs) is not None}
    heard |= dict(n_mels=fields["num_mels"], hop_length=math.prod(fields["upsample_rates"]))
    for name, value in heard.items():
        if value != representation[name]:
            source.note(file, f"{name} {value}, but the model's representation has {representation[name]}")
    return {"model_type": "hifigan", **fields}


def _fused(tensors: Tensors) -> Tensors:
    """Weight norm multiplied out: w = g v / |v|, one norm for each index of the first axis (Salimans & Kingma 2016)."""
    fused = dict(tensors)
    for g_name, v_name in _WEIGHT_NORMS:
        for name in [name for name in fused if name.endswith(f".{v_name}")]:
            layer = name.removesuffix(v_name)
            if f"{layer}{g_name}" not in fused or fused[name].shape[:1] != (fused[f"{layer}{g_name}"].size,):
                continue  # and so the weight is told as missing
            v, g = fused.pop(name).astype(np.float32), fused.pop(f"{layer}{g_name}").astype(np.float32)
            norm = np.sqrt(np.square(v).sum(axis=tuple(range(1, v.ndim)), keepdims=True))
            fused[f"{layer}weight"] = v * (g.reshape(-1, *(1,) * (v.ndim - 1)) / norm)
    return fused


def read_tensors(source: Published, folder: str) -> Tensors | None:
    """The generator's tensors with HiFi-GAN's names and weight norm fused."""
    where = source.path / folder
    checkpoints = [max(found).name for pattern in _CHECKPOINTS if (found := list(where.glob(pattern)))]  # the newest
    tensors = source.tensors(folder, ("vocoder", "model", "pytorch_model", "generator"), checkpoints)
    if tensors is None:
        return None
    prefix = "generator."
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    generator = inner or tensors
    normalised = {name: generator.pop(name) for name in ("mean", "scale") if name in generator}
    config = source.config(f"{folder}/config.json") or {}
    is_plain = (normalised.get("mean", np.zeros(1)) == 0).all() and (normalised.get("scale", np.ones(1)) == 1).all()
    if config.get("normalize_before", True) and not is_plain:
        source.note(folder, "another architecture: normalize_before with a mean and scale of its own")
    return {name.replace("upsampler.", "ups.", 1): tensor for name, tensor in _fused(generator).items()}


def to_published(config: ConfigDict, params: Params) -> tuple[dict[str, Any], Tensors, str]:
    """The config, tensors and name of the weight file that transformers loads, or HiFi-GAN's own for resblock "2"."""
    vocoder, mel, tensors = config.vocoder.to_dict(), config.representation, to_torch(params)
    del vocoder["model_type"]
    content = {key: vocoder[key] for key in _SHAPE} | {"sampling_rate": mel.sample_rate}
    if vocoder["resblock"] == "1":
        content |= dict(model_type="speecht5_hifigan", architectures=["SpeechT5HifiGan"])
        content |= dict(model_in_dim=vocoder["num_mels"], leaky_relu_slope=0.1, normalize_before=False)
        tensors = {name.replace("ups.", "upsampler.", 1): tensor for name, tensor in tensors.items()}
        tensors |= dict(mean=np.zeros(vocoder["num_mels"], np.float32), scale=np.ones(vocoder["num_mels"], np.float32))
        return content, tensors, "model"
    content |= dict(num_mels=vocoder["num_mels"], resblock=vocoder["resblock"])
    content |= {theirs: mel[ours] for theirs, ours in _HEARS.items()}
    return content, tensors, "vocoder"
