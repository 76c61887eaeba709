"""The parts of a model: their names, and how each is built from the resolved config."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from subtractive_jax.errors import unknown_name
from subtractive_jax.models import autoencoder, clip_text, t5, unet
from subtractive_jax.models.network import Network
from subtractive_jax.vocoder import hifigan

TEXT_ENCODERS = ("t5", "clip_text_model")
PARTS = ("text_encoder", "autoencoder", "vocoder", "base_denoiser", "denoiser")


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
    latent = config.autoencoder.latent_channels
    match part:
        case "text_encoder":
            return _text_encoder(config.text_encoder)
        case "autoencoder":
            return autoencoder.kl(config.autoencoder, dtype)
        case "vocoder":
            if config.vocoder.model_type != "hifigan":
                raise unknown_name("vocoder.model_type with parameters", config.vocoder.model_type, ("hifigan",))
            return hifigan.generator(config.vocoder, dtype)
        case "base_denoiser":
            return unet.denoiser(config.denoiser, latent, latent, 0, dtype, remat)
        case "denoiser":
            num_stems = len(config.data.stems) if config.stem_tokens else 0
            return unet.denoiser(config.denoiser, 2 * latent, latent, num_stems, dtype, remat)
    raise unknown_name("part", part, PARTS)


def _text_encoder(config: Any) -> Network:
    match config.model_type:
        case "t5":
            return t5.encoder(config)
        case "clip_text_model":
            return clip_text.encoder(config)
    raise unknown_name("text_encoder.model_type", config.model_type, TEXT_ENCODERS)


def needed(parts: Iterable[str], config: Any) -> tuple[str, ...]:
    """Those of `parts` that hold parameters: Griffin-Lim is a vocoder without any."""
    return tuple(part for part in parts if part != "vocoder" or config.vocoder.model_type != "griffin_lim")
