"""Folders of the Stable Diffusion 1.x family in diffusers' layout -> a model.

`unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`, with or without `vocoder/`. Auffusion's models with a
condition adapter have `condition_config.json`, `condition_adapter_0/` and `text_encoder_0/` instead of a text encoder
and tokenizer. What `export.py` writes in addition is read back: `base_unet/`, `stem_tokens/`.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from subtractive_jax import parts
from subtractive_jax.models import unet
from subtractive_jax.weights import hifigan_layout, schedulers, text_encoders, vocos_layout
from subtractive_jax.weights.model_folder import ModelFiles
from subtractive_jax.weights.published import Fields, Published, Tensors

OWN_CONFIG = "subtractive_jax.json"  # the config that an exported folder was written from
WEIGHTS = "diffusion_pytorch_model"
ADAPTER = "condition_adapter"
CONDITIONS = "condition_config.json"
STEM_TOKENS = "stem_tokens"
_TEXT_RULES = ("text_padding", "null_text")

# What diffusers' `EMAModel.save_pretrained` adds to a config, and published UNets therefore say.
_EMA = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")

_UNET = Fields(  # diffusers' UNet2DConditionModel
    taken=dict(
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=1280,
        norm_num_groups=32,
        norm_eps=1e-5,
        transformer_layers_per_block=1,
        use_linear_projection=False,
        flip_sin_to_cos=True,
        freq_shift=0,
    ),
    fixed=dict(
        center_input_sample=False,
        mid_block_type="UNetMidBlock2DCrossAttn",
        downsample_padding=1,
        mid_block_scale_factor=1,
        act_fn="silu",
        resnet_time_scale_shift="default",
        resnet_out_scale_factor=1.0,
        time_embedding_type="positional",
        conv_in_kernel=3,
        conv_out_kernel=3,
        attention_type="default",
    ),
    ignored=(
        "in_channels",
        "out_channels",
        "sample_size",
        "upcast_attention",
        "addition_embed_type_num_heads",
        "dropout",
        *_EMA,
    ),
    per_block=("attention_head_dim", "transformer_layers_per_block"),
)
_VAE = Fields(  # diffusers' AutoencoderKL
    taken=dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(64,),
        layers_per_block=1,
        norm_num_groups=32,
        mid_block_add_attention=True,
    ),
    fixed=dict(act_fn="silu", use_quant_conv=True, use_post_quant_conv=True),
    ignored=(
        "down_block_types",
        "up_block_types",
        "sample_size",
        "force_upcast",
        "scaling_factor",
        "shift_factor",
        "latents_mean",
        "latents_std",
    ),
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read(source: Published, config: ConfigDict, part: str) -> ModelFiles:
    """The model in a published folder.

    Args:
      config: what the folder does not say: representation, stems, target, how to train and sample. Architecture, noise
        schedule, scales and text rules are taken from the folder.
      part: `base_denoiser`, whose UNet reads the noisy latent alone, or `denoiser`, whose UNet reads the context's too.

    Raises:
      UserError: names everything that is missing, damaged, or of another architecture.
    """
    settings: dict[str, Any] = config.to_dict()
    folders = {part: "unet"} | ({"base_denoiser": "base_unet"} if source.has("base_unet") else {})
    if "unet" not in folders.values():
        source.note("unet", "reads the context, as base_unet shows; convert it with --from=instruct-pix2pix")
    conditions = _conditions(source)
    text = _read_text(source, settings, conditions)
    settings["schedule"], settings["sampling"]["solver"] = schedulers.read(source, config)
    has_vae = _read_vae(source, settings)
    readable = [each for each in folders if _read_unet(source, each, folders[each], settings)]
    settings["denoiser"]["condition_dim"] = conditions["condition_dim"] if conditions else 0
    width = settings["denoiser"]["cross_attention_dim"]
    if text and readable and not conditions and text.features != width:
        source.note("unet", f"cross_attention_dim {width}, but the text encoder's states have {text.features}")
    if part == "denoiser":
        _read_stems(source, settings)
    vocoder = _read_vocoder(source, settings, config.representation)
    settings |= dict(stage="subtractive" if part == "denoiser" else "base", init_from="")

    resolved = ConfigDict(settings)
    params = {}
    if text and text.tensors is not None:
        params["text_encoder"] = source.params(text.folder, "text_encoder", resolved, text.tensors)
    if has_vae and (tensors := source.tensors("vae", (WEIGHTS,))) is not None:
        params["autoencoder"] = source.params("vae", "autoencoder", resolved, _new_attention_names(tensors))
    for each in readable:
        if (tensors := _denoiser_tensors(source, each, folders[each], conditions)) is not None:
            params[each] = source.params(folders[each], each, resolved, tensors)
    if vocoder and (tensors := vocoder.read_tensors(source, "vocoder")) is not None:
        params["vocoder"] = source.params("vocoder", "vocoder", resolved, tensors)
    source.check()
    return ModelFiles(resolved, params, text.tokenizer if text else None)


def _read_vocoder(source: Published, settings: dict[str, Any], representation: ConfigDict) -> ModuleType | None:
    """The layout that the folder's vocoder is in, if there is one."""
    if not source.has("vocoder") and settings["vocoder"]["model_type"] not in parts.VOCODERS:
        return None
    content = source.config("vocoder/config.json")
    if content is None:
        return None
    layout = vocos_layout if content.get("model_type") == vocos_layout.MODEL_TYPE else hifigan_layout
    vocoder = layout.read_config(source, "vocoder", content, representation)
    if vocoder is None:
        return None
    settings["vocoder"] = vocoder
    return layout


def widen(files: ModelFiles) -> ModelFiles:
    """Adds a denoiser that reads the context too, and computes what the base denoiser computes until it is trained."""
    config = ConfigDict(files.config.to_dict())
    config.update(stem_tokens=False, stage="subtractive")
    wide = unet.widen_input(files.params["base_denoiser"], 2 * config.autoencoder.latent_channels)
    return ModelFiles(config, {**files.params, "denoiser": wide}, files.tokenizer)


def _conditions(source: Published) -> dict[str, Any] | None:
    """Auffusion's `condition_config.json`: a list with one text encoder and its adapter."""
    if not source.has(CONDITIONS):
        return None
    content = source.json(CONDITIONS)
    if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
        source.note(CONDITIONS, "not a list with one text encoder")
        return None
    names = dict(text_encoder_name="text_encoder_0", condition_adapter_name=f"{ADAPTER}_0", condition_max_length=77)
    taken = source.fields(CONDITIONS, content[0], Fields({**names, "condition_dim": 768}), strict=False)
    for key in ("text_encoder_name", "condition_adapter_name"):
        if taken[key] in ("", "..") or Path(taken[key]).name != taken[key]:
            source.note(CONDITIONS, f'{key} "{taken[key]}" is not the name of a folder beside it')
            return None
    return taken


def _read_text(
    source: Published, settings: dict[str, Any], conditions: dict[str, Any] | None
) -> text_encoders.TextEncoder | None:
    folder = conditions["text_encoder_name"] if conditions else "text_encoder"
    tokenizer_folder = "tokenizer" if source.has("tokenizer") or not conditions else folder
    text = text_encoders.read(source, folder, tokenizer_folder, ("clip_text_model", "t5"))
    if text is None:
        return None
    settings["text_encoder"] = text.config
    longest = conditions["condition_max_length"] if conditions else settings["max_text_tokens"]
    if conditions:
        settings["max_text_tokens"] = longest
        if text.features != conditions["condition_dim"]:
            source.note(CONDITIONS, f"condition_dim {conditions['condition_dim']}, but {folder} has {text.features}")
    if text.max_tokens is not None and longest > text.max_tokens:
        source.note(folder, f"reads at most {text.max_tokens} tokens, max_text_tokens is {longest}")
    t5_or_clip = ("masked", "empty") if text.config["model_type"] == "t5" else ("tokens", "empty")
    rules = dict(zip(_TEXT_RULES, ("zeros", "zeros") if conditions else t5_or_clip, strict=True))
    if source.has(OWN_CONFIG):
        own = source.config(OWN_CONFIG) or {}
        rules = {key: own.get(key, rule) for key, rule in rules.items()}
    settings |= rules
    return text


def _read_vae(source: Published, settings: dict[str, Any]) -> bool:
    """Takes architecture and scales of the autoencoder; False where there is nothing to take."""
    file = "vae/config.json"
    content = source.config(file)
    if content is None:
        return False
    fields = settings["autoencoder"] = source.fields(file, content, _VAE)
    for key, name in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if content.get(key, [name]) != [name] * len(fields["block_out_channels"]):
            source.note(file, f"another architecture: {key} is {content.get(key)!r}")
    latent = fields["latent_channels"]
    means = content.get("latents_mean") or [content.get("shift_factor") or 0.0] * latent
    stds = content.get("latents_std") or [1.0] * latent
    scaling = source.fields(
        file,
        dict(scaling_factor=content.get("scaling_factor", 0.18215), latents_mean=means, latents_std=stds),
        Fields(dict(scaling_factor=1.0, latents_mean=(0.0,), latents_std=(1.0,))),
    )
    if not len(scaling["latents_mean"]) == len(scaling["latents_std"]) == latent:
        source.note(file, f"latents_mean and latents_std are not of {latent} channels")
    settings["latent_shift"] = tuple(map(float, scaling["latents_mean"]))
    settings["latent_scale"] = tuple(scaling["scaling_factor"] / std for std in scaling["latents_std"])
    if len(settings["context_scale"]) != latent:
        settings["context_scale"] = (1.0,) * latent  # InstructPix2Pix's
    return True


def _read_unet(source: Published, part: str, folder: str, settings: dict[str, Any]) -> bool:
    """Takes the architecture of a denoiser; False where there is none to take."""
    file = f"{folder}/config.json"
    content = source.config(file)
    if content is None:
        return False
    latent = settings["autoencoder"]["latent_channels"]
    expected, other, kind = latent, 2 * latent, "instruct-pix2pix"
    if part == "denoiser":
        expected, other, kind = other, expected, "stable-diffusion, riffusion or auffusion"
    reads, writes = content.get("in_channels", 4), content.get("out_channels", 4)
    if reads != expected:
        hint = f"; convert it with --from={kind}" if reads == other else ""
        source.note(file, f"reads {reads} channels, not {expected}{hint}")
    if writes != latent:
        source.note(file, f"writes {writes} channels, but the autoencoder's latents have {latent}")
    only_cross_attention = content.get("only_cross_attention")
    if isinstance(only_cross_attention, list) and not any(only_cross_attention):  # one for each block
        content = {**content, "only_cross_attention": False}
    settings["denoiser"] = source.fields(file, content, _UNET)
    return True


def _read_stems(source: Published, settings: dict[str, Any]) -> None:
    settings["stem_tokens"] = source.has(STEM_TOKENS)
    file = f"{STEM_TOKENS}/config.json"
    if settings["stem_tokens"] and (content := source.config(file)) is not None:
        settings["data"] |= source.fields(file, content, Fields(dict(stems=("drums",))), strict=False)


def _denoiser_tensors(source: Published, part: str, folder: str, conditions: dict[str, Any] | None) -> Tensors | None:
    """The UNet's tensors, with the adapter's and the stem tokens' that belong to it."""
    tensors = source.tensors(folder, (WEIGHTS,))
    if tensors is None:
        return None
    extras: list[tuple[str, str, str]] = []
    if conditions:
        name = conditions["condition_adapter_name"]
        extras.append((f"{ADAPTER}.", f"base_{name}" if folder == "base_unet" else name, ADAPTER))
    if part == "denoiser" and source.has(STEM_TOKENS):
        extras.append(("", STEM_TOKENS, "stem_embedding"))
    for prefix, where, stem in extras:
        more = source.tensors(where, (stem,))
        if more is None:
            return None
        tensors |= {f"{prefix}{name}": tensor for name, tensor in more.items()}
    return tensors


def _new_attention_names(tensors: Tensors) -> Tensors:
    """The autoencoder's attention as newer files name it; older ones also hold it as 1x1 convolutions."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            for old, new in _OLD_ATTENTION.items():
                name = name.replace(f".{old}.", f".{new}.")
            if tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed
