"""A model -> a folder in diffusers' layout, whose parts diffusers and transformers load and compute alike."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.numpy
from ml_collections import ConfigDict

from subtractive_jax.errors import UserError
from subtractive_jax.models.network import Params
from subtractive_jax.weights import hifigan_layout, schedulers, text_encoders, tokenizer_files, vocos_layout
from subtractive_jax.weights.diffusers_layout import ADAPTER, CONDITIONS, OWN_CONFIG, STEM_TOKENS, WEIGHTS
from subtractive_jax.weights.model_folder import ModelFiles, new_folder
from subtractive_jax.weights.published import Tensors
from subtractive_jax.weights.torch_layout import to_torch

_NEEDED = ("text_encoder", "autoencoder")
_STEM_EMBEDDING = "stem_embedding.weight"


def save(path: Path, files: ModelFiles) -> None:
    """Writes the folder, whole or not at all: safetensors in float32.

    Raises:
      UserError: `path` exists, or the model lacks a part that the layout needs.
    """
    unets = _unets(files)
    missing = [part for part in _NEEDED if part not in files.params]
    if not unets:
        missing.append("base_denoiser or denoiser")
    if files.tokenizer is None:
        missing.append("tokenizer")
    if missing:
        raise UserError(f"the layout of diffusers needs parts that the model lacks: {', '.join(missing)}")
    config = files.config
    with new_folder(path) as folder:
        for name, part in unets.items():
            _write_unet(folder, name, part, files)
        _write_component(folder / "vae", _vae_json(config), to_torch(files.params["autoencoder"]), WEIGHTS)
        _write_component(folder / "text_encoder", *text_encoders.to_published(config, files.params["text_encoder"]))
        assert files.tokenizer is not None
        tokenizer_files.write(folder / "tokenizer", files.tokenizer, config.text_encoder, config.max_text_tokens)
        _write_json(folder / schedulers.FILE, schedulers.to_json(config))
        if "vocoder" in files.params:
            _write_component(folder / "vocoder", *_published_vocoder(config, files.params["vocoder"]))
        if config.denoiser.condition_dim:
            _write_json(folder / CONDITIONS, [_condition_json(config)])
        pipeline, lacks = _stock_pipeline(config, unets)
        if not lacks:
            _write_json(folder / "model_index.json", _model_index(config, pipeline))
        _write_json(folder / OWN_CONFIG, config.to_dict())
        (folder / "README.md").write_text(_readme(path.name, folder, pipeline, lacks), encoding="utf-8")


def _published_vocoder(config: ConfigDict, params: Params) -> tuple[dict[str, Any], Tensors, str]:
    """Config, tensors and name of the weight file."""
    layout = vocos_layout if config.vocoder.model_type == vocos_layout.MODEL_TYPE else hifigan_layout
    return layout.to_published(config, params)


def _unets(files: ModelFiles) -> dict[str, str]:
    """Folder -> part: `unet` is the denoiser, or the base denoiser of a model that has no other."""
    found = [part for part in ("denoiser", "base_denoiser") if part in files.params]
    return dict(zip(("unet", "base_unet"), found, strict=False))


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8")


def _write_component(folder: Path, content: Mapping[str, Any], tensors: Tensors, stem: str = "model") -> None:
    _write_json(folder / "config.json", content)
    safetensors.numpy.save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


def _latent_size(config: ConfigDict) -> int | list[int]:
    """One number where it says all: pipelines of some releases compare it with 64."""
    factor = 2 ** (len(config.autoencoder.block_out_channels) - 1)
    height, width = config.representation.n_mels // factor, math.ceil(config.representation.window_frames / factor)
    return height if height == width else [height, width]


def _write_unet(folder: Path, name: str, part: str, files: ModelFiles) -> None:
    config, tensors = files.config, to_torch(files.params[part])
    content = config.denoiser.to_dict()
    condition_dim = content.pop("condition_dim")
    latent = config.autoencoder.latent_channels
    content |= dict(
        _class_name="UNet2DConditionModel",
        in_channels=latent if part == "base_denoiser" else 2 * latent,
        out_channels=latent,
        sample_size=_latent_size(config),
    )
    adapter = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{ADAPTER}.")}
    if adapter:
        adapter = {key.removeprefix(f"{ADAPTER}."): tensor for key, tensor in adapter.items()}
        where = folder / (f"{ADAPTER}_0" if name == "unet" else f"base_{ADAPTER}_0")
        widths = dict(condition_dim=condition_dim, cross_attention_dim=content["cross_attention_dim"])
        _write_component(where, widths, adapter, ADAPTER)
    if _STEM_EMBEDDING in tensors:
        stems = dict(stems=config.data.stems, cross_attention_dim=content["cross_attention_dim"])
        stem_tokens = {_STEM_EMBEDDING: tensors.pop(_STEM_EMBEDDING)}
        _write_component(folder / STEM_TOKENS, stems, stem_tokens, "stem_embedding")
    _write_component(folder / name, content, tensors, WEIGHTS)


def _has_one_scale(config: ConfigDict) -> bool:
    return len(set(config.latent_scale)) == 1 and set(config.latent_shift) == {0.0}


def _vae_json(config: ConfigDict) -> dict[str, Any]:
    content = config.autoencoder.to_dict()
    blocks = len(content["block_out_channels"])
    content |= dict(
        _class_name="AutoencoderKL",
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        sample_size=config.representation.n_mels,
    )
    if _has_one_scale(config):
        return content | dict(scaling_factor=config.latent_scale[0])
    stds = [1.0 / scale for scale in config.latent_scale]
    return content | dict(scaling_factor=1.0, latents_mean=list(config.latent_shift), latents_std=stds)


def _condition_json(config: ConfigDict) -> dict[str, Any]:
    return dict(
        text_encoder_name="text_encoder",
        condition_adapter_name=f"{ADAPTER}_0",
        condition_type=config.text_encoder.model_type,
        condition_max_length=config.max_text_tokens,
        condition_dim=config.denoiser.condition_dim,
        cross_attention_dim=config.denoiser.cross_attention_dim,
    )


def _stock_pipeline(config: ConfigDict, unets: Mapping[str, str]) -> tuple[str, list[str]]:
    """The diffusers pipeline for such a model, and what of ours it does not do."""
    reads_context = unets["unet"] == "denoiser"
    pipeline = "StableDiffusionInstructPix2PixPipeline" if reads_context else "StableDiffusionPipeline"
    lacks = {
        "states of a T5 encoder": config.text_encoder.model_type != "clip_text_model",
        "the condition adapter (condition_adapter_0/)": config.denoiser.condition_dim > 0,
        "the stem token (stem_tokens/)": reads_context and config.stem_tokens,
        f'text padding "{config.text_padding}"': config.text_padding != "tokens",
        f'null text "{config.null_text}"': config.null_text != "empty",
        "a scale for each latent channel (latents_mean, latents_std in vae/config.json)": not _has_one_scale(config),
        "a scaled context": reads_context and set(config.context_scale) != {1.0},
        "a steps_offset other than 1": not reads_context and config.schedule.steps_offset != 1,
        "zero terminal SNR in PNDM": config.sampling.solver == "pndm" and config.schedule.rescale_betas_zero_snr,
        "images of other than three channels": config.autoencoder.in_channels != 3,
    }
    return pipeline, [what for what, is_lacking in lacks.items() if is_lacking]


def _model_index(config: ConfigDict, pipeline: str) -> dict[str, Any]:
    return dict(
        _class_name=pipeline,
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        scheduler=["diffusers", schedulers.to_json(config)["_class_name"]],
        safety_checker=[None, None],
        feature_extractor=[None, None],
        image_encoder=[None, None],
        requires_safety_checker=False,
    )


_FOLDERS = {
    "unet": "the denoiser, diffusers' `UNet2DConditionModel`",
    "base_unet": "the base denoiser, which reads no context, likewise",
    "vae": "the autoencoder, diffusers' `AutoencoderKL`",
    "text_encoder": "transformers' `T5EncoderModel` or `CLIPTextModel`",
    "tokenizer": "its tokenizer, transformers' `AutoTokenizer`",
    "scheduler": "noise schedule and solver, a scheduler of diffusers",
    "vocoder": "HiFi-GAN or Vocos, as its `config.json` says: natural logarithms of mel magnitudes to audio",
    f"{ADAPTER}_0": "a linear layer and a layer norm (epsilon 1e-5) between the text states and `unet`",
    f"base_{ADAPTER}_0": "the same for `base_unet`",
    STEM_TOKENS: "a vector for each stem of its `config.json`, which follows the text states that `unet` reads",
    CONDITIONS: "what Auffusion's programs read to find the adapter",
    OWN_CONFIG: "the config this was written from: representation, stems, scales, guidance",
}


def _readme(name: str, folder: Path, pipeline: str, lacks: list[str]) -> str:
    held = "\n".join(f"- `{entry}`: {what}" for entry, what in _FOLDERS.items() if (folder / entry).exists())
    kind = "instruct-pix2pix" if pipeline.endswith("Pix2PixPipeline") else "stable-diffusion"
    if lacks:
        use = f"There is no `model_index.json`, because diffusers' `{pipeline}` lacks: {'; '.join(lacks)}."
    else:
        use = f"diffusers' `{pipeline}.from_pretrained` loads this folder; it makes images, not audio."
    return f"""# {name}

Written by `python -m launch.convert --to=diffusers`; weights are safetensors in float32.

{held}

A denoiser of twice the latent channels reads the noisy latent, then the context's.

{use}

Back again: `python -m launch.convert --from={kind} --input={name} --output=MODEL`
"""
