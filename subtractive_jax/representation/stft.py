"""Windowed frames of a signal and their overlap-add: slices of blocks a hop long, so that gradients need no scatter."""

import jax
import jax.numpy as jnp
import numpy as np


def hann(length: int) -> np.ndarray:
    """The periodic Hann window, float32 [length], of torch's and librosa's STFT."""
    return (0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(length) / length)).astype(np.float32)


def frame(audio: jax.Array, length: int, hop_length: int) -> jax.Array:
    """Cuts [..., samples] into frames [..., (samples - length) // hop_length + 1, length]."""
    frames, hops = (audio.shape[-1] - length) // hop_length + 1, -(-length // hop_length)
    blocks = frames + hops - 1
    widths = [(0, 0)] * (audio.ndim - 1) + [(0, max(0, blocks * hop_length - audio.shape[-1]))]
    audio = jnp.pad(audio, widths)[..., : blocks * hop_length].reshape(*audio.shape[:-1], blocks, hop_length)
    return jnp.concatenate([audio[..., i : i + frames, :] for i in range(hops)], axis=-1)[..., :length]


def overlap_add(frames: jax.Array, hop_length: int) -> jax.Array:
    """Sums frames [..., frames, length], each a hop after the last, to [..., (frames - 1) * hop_length + length]."""
    *batch, count, length = frames.shape
    hops = -(-length // hop_length)
    nothing = [(0, 0)] * len(batch)
    blocks = jnp.pad(frames, [*nothing, (0, 0), (0, hops * hop_length - length)])
    blocks = blocks.reshape(*batch, count, hops, hop_length)
    shifted = [jnp.pad(blocks[..., i, :], [*nothing, (i, hops - 1 - i), (0, 0)]) for i in range(hops)]
    return sum(shifted[1:], shifted[0]).reshape(*batch, -1)[..., : (count - 1) * hop_length + length]


def inverse_stft(
    spectrum: jax.Array, n_fft: int, win_length: int, hop_length: int, before: int, samples: int
) -> jax.Array:
    """Spectra [..., frames, bins] to the audio [..., samples] whose STFT is nearest (Griffin & Lim 1984, equation 6).

    Where no two frames overlap a sample may be under no window at all; it is 0.

    Args:
      before: how many samples the first frame's Hann window lies ahead of the audio.
    """
    window, heard = hann(win_length), slice(before, before + samples)
    framed = jnp.fft.irfft(spectrum, n_fft)[..., :win_length] * window
    weight = overlap_add(jnp.broadcast_to(window**2, framed.shape[-2:]), hop_length)[heard]
    return overlap_add(framed, hop_length)[..., heard] / jnp.maximum(weight, 1e-11)
