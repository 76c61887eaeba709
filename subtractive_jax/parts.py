"""The parts of a model: their names, and how each is built from the resolved config.

A part that the config sets to None is not there: piano rolls need no autoencoder and no vocoder.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models import autoencoder, clip_text, t5, unet
from subtractive_jax.models.network import Network
from subtractive_jax.representation.piano_roll import PianoRoll
from subtractive_jax.vocoder import hifigan, vocos

TEXT_ENCODERS = ("t5", "clip_text_model")
VOCODERS = ("hifigan", "vocos")
PARTS = ("text_encoder", "autoencoder", "vocoder", "base_denoiser", "denoiser")


class Latents(NamedTuple):
    """What a window is to the denoisers.

    Attributes:
      shape: of what they write, [F, T, C]: the autoencoder's latent, or of a piano roll the channels of one part, since
        the stem says which.
      context_channels: of what `denoiser` reads beside it, [F, T, context_channels].
      stored, stored_context: the shapes of both as training reads them: posterior moments of an autoencoder.
    """

    shape: tuple[int, int, int]
    context_channels: int
    stored: tuple[int, int, int]
    stored_context: tuple[int, int, int]


def latents(config: Any) -> Latents:
    """The latents of a model."""
    if config.autoencoder is None:
        roll = PianoRoll.from_config(config.representation)
        grid = roll.octaves, roll.window_steps
        part, context = (*grid, roll.channels // len(roll.parts)), (*grid, roll.context_channels)
        return Latents(part, roll.context_channels, part, context)
    stride = 2 ** (len(config.autoencoder.block_out_channels) - 1)
    grid = config.representation.n_mels // stride, config.representation.window_frames // stride
    channels = config.autoencoder.latent_channels
    moments = (*grid, 2 * channels)
    return Latents((*grid, channels), channels, moments, moments)


def network(part: str, config: Any, remat: str = "none") -> Network:
    """The network of `part`.

    Both denoisers write latents; `denoiser` reads the context's latents too, and a stem if the config has stem tokens;
    `base_denoiser` reads neither.

    Args:
      remat: what of a denoiser is computed again for the gradient, see `unet.REMAT`.

    Raises:
      UserError: an unknown part, or a config its network refuses.
    """
    dtype = jnp.dtype(config.compute_dtype)
    match part:
        case "text_encoder":
            return _text_encoder(config.text_encoder)
        case "autoencoder":
            return autoencoder.kl(config.autoencoder, dtype)
        case "vocoder":
            return _vocoder(config, dtype)
        case "base_denoiser":
            channels = latents(config).shape[-1]
            return unet.denoiser(config.denoiser, channels, channels, 0, dtype, remat)
        case "denoiser":
            _, _, channels = (about := latents(config)).shape
            num_stems = len(config.data.stems) if config.stem_tokens else 0
            return unet.denoiser(config.denoiser, channels + about.context_channels, channels, num_stems, dtype, remat)
    raise unknown_name("part", part, PARTS)


def _text_encoder(config: Any) -> Network:
    match config.model_type:
        case "t5":
            return t5.encoder(config)
        case "clip_text_model":
            return clip_text.encoder(config)
    raise unknown_name("text_encoder.model_type", config.model_type, TEXT_ENCODERS)


def _vocoder(config: Any, dtype: DTypeLike) -> Network:
    match config.vocoder.model_type:
        case "hifigan":
            return hifigan.generator(config.vocoder, dtype)
        case "vocos":
            ours, theirs = config.vocoder.hop_length, config.representation.hop_length
            if ours != theirs:
                raise UserError(f"config.vocoder.hop_length is {ours}, config.representation.hop_length {theirs}")
            return vocos.generator(config.vocoder, dtype)
    raise unknown_name("vocoder.model_type with parameters", config.vocoder.model_type, VOCODERS)


def vocoder_reach(config: Any) -> int:
    """How many frames to either side of a sample a vocoder with parameters hears, at most."""
    return vocos.reach(config.vocoder) if config.vocoder.model_type == "vocos" else hifigan.REACH


def needed(parts: Iterable[str], config: Any) -> tuple[str, ...]:
    """Those of `parts` that the model has and that hold parameters: Griffin-Lim is a vocoder without any."""
    lacking = {part for part in ("autoencoder", "vocoder") if config[part] is None}
    if "vocoder" not in lacking and config.vocoder.model_type == "griffin_lim":
        lacking.add("vocoder")
    return tuple(part for part in parts if part not in lacking)
