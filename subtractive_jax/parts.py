"""The parts of a model: their names, and how each is built from the resolved config."""

from typing import Any

import jax.numpy as jnp

from subtractive_jax.errors import unknown_name
from subtractive_jax.models import autoencoder, t5, unet
from subtractive_jax.models.network import Network
from subtractive_jax.vocoder import hifigan

PARTS = ("text_encoder", "autoencoder", "vocoder", "base_denoiser", "denoiser")


def network(part: str, config: Any) -> Network:
    """The network of `part`.

    Both denoisers write latents; `denoiser` reads the context's latents too, and a stem; `base_denoiser` reads neither.

    Raises:
      UserError: an unknown part, or a config its network refuses.
    """
    dtype = jnp.dtype(config.compute_dtype)
    latent = config.autoencoder.latent_channels
    match part:
        case "text_encoder":
            return t5.encoder(config.text_encoder)
        case "autoencoder":
            return autoencoder.kl(config.autoencoder, dtype)
        case "vocoder":
            return hifigan.generator(config.vocoder, dtype)
        case "base_denoiser":
            return unet.denoiser(config.denoiser, latent, latent, 0, dtype)
        case "denoiser":
            return unet.denoiser(config.denoiser, 2 * latent, latent, len(config.data.stems), dtype)
    raise unknown_name("part", part, PARTS)
