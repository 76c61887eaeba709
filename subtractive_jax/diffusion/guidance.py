"""Classifier-free guidance over text (Ho & Salimans 2022), and over context and text (InstructPix2Pix).

Both are linear in the denoiser's outputs with weights that sum to one, so they hold for epsilon and v alike.
"""

import jax
import jax.numpy as jnp


def text(null: jax.Array, text: jax.Array, text_guidance: float | jax.Array) -> jax.Array:
    """e(0) + s_T [e(y) - e(0)]: outputs for the null text and for the text."""
    return null + text_guidance * (text - null)


def context_and_text(
    null: jax.Array,
    context: jax.Array,
    both: jax.Array,
    context_guidance: float | jax.Array,
    text_guidance: float | jax.Array,
) -> jax.Array:
    """e(0,0) + s_I [e(c,0) - e(0,0)] + s_T [e(c,y) - e(c,0)] (Brooks et al. 2023, eq. 3).

    Args:
      null: output for null context and null text, e(0,0).
      context: output for the context and null text, e(c,0).
      both: output for the context and the text, e(c,y).
      context_guidance: s_I; 1 with text_guidance 1 leaves e(c,y).
      text_guidance: s_T.
    """
    return null + context_guidance * (context - null) + text_guidance * (both - context)


def rescaled(guided: jax.Array, conditional: jax.Array, rescale: float | jax.Array) -> jax.Array:
    """Brings the spread of guided outputs back to that of the conditional ones (Lin et al. 2024, eq. 15 and 16).

    Strong guidance makes outputs larger than any in training, which saturates what they become.

    Args:
      guided, conditional: [B, ...].
      rescale: phi, how much of the correction is taken: 0 leaves `guided`, 1 gives it the other's standard deviation.
    """
    axes = tuple(range(1, guided.ndim))
    factor = jnp.std(conditional, axes, keepdims=True) / jnp.maximum(jnp.std(guided, axes, keepdims=True), 1e-8)
    return guided * (1.0 + rescale * (factor - 1.0))
