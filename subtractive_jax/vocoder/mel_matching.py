"""What a vocoder wrote, brought to the mel magnitudes that it was given.

A vocoder hears a mel image and is free to answer with another one; a small one does. In turns the spectrum is scaled to
the image's magnitudes and replaced by that of a signal (Griffin & Lim 1984, equation 6), beginning with the vocoder's
audio. So the phases, and what lies within a mel band, stay the vocoder's.
"""

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.errors import UserError
from subtractive_jax.representation.mel import Mel

_MOST = 3.0  # nats that one turn scales by: what is nearly silent has phases that mean nothing


def check(mel: Mel, iterations: int) -> None:
    """Raises UserError where vocoders' audio cannot be matched."""
    if iterations < 0 or mel.framing == "centered":
        raise UserError(
            f"config.mel_matching={iterations}: it must be 0 or more, and 0 where representation.framing is centered, "
            "whose images have a frame more than a vocoder's audio"
        )


def match_mel(mel: Mel, audio: jax.Array, image: jax.Array, iterations: int) -> jax.Array:
    """Audio [..., mel.samples(frames)] whose mel image is nearer to `image` [..., n_mels, frames, 1] with each turn."""
    highest = jax.lax.Precision.HIGHEST
    shares = mel.filters / np.maximum(mel.filters.sum(axis=0), 1e-12)  # of the mel bands in each of the STFT's bins
    wanted = mel.log_magnitude(image)

    def turn(_: int, audio: jax.Array) -> jax.Array:
        gain = jnp.clip(wanted - mel.log_magnitude(mel.encode(audio)), -_MOST, _MOST)
        return mel.istft(mel.stft(audio) * jnp.exp(jnp.einsum("mk,...mt->...tk", shares, gain, precision=highest)))

    return jax.lax.fori_loop(0, iterations, turn, audio)


def reach(mel: Mel, iterations: int) -> int:
    """How many frames to either side of a sample its value depends on, at most."""
    return iterations * 2 * -(-mel.win_length // (2 * mel.hop_length))
