"""Spectral losses between waveforms.

Multi-resolution STFT loss: Parallel WaveGAN (Yamamoto et al. 2020, arXiv:1910.11480), section 3.2, with its settings.
Mel loss: HiFi-GAN (Kong et al. 2020, arXiv:2010.05646), equation 5.
"""

import jax
import jax.numpy as jnp

from subtractive_jax.representation.mel import Mel
from subtractive_jax.representation.stft import frame, hann

RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # FFT size, hop, window in samples
_POWER_FLOOR = 1e-7  # keeps the square root's and the logarithm's gradients finite


def stft_magnitude(audio: jax.Array, n_fft: int, hop_length: int, win_length: int) -> jax.Array:
    """Magnitudes of Hann-windowed frames, the signal reflected at its ends: [B, samples] -> [B, frames, bins]."""
    audio = jnp.pad(audio, ((0, 0), (win_length // 2,) * 2), mode="reflect")
    spectrum = jnp.fft.rfft(frame(audio, win_length, hop_length) * hann(win_length), n_fft)
    return jnp.sqrt(jnp.maximum(jnp.square(spectrum.real) + jnp.square(spectrum.imag), _POWER_FLOOR))


def multi_resolution_stft(audio: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Spectral convergence and log-magnitude L1 of waveforms [B, samples], each [B], averaged over `RESOLUTIONS`.

    Spectral convergence is relative to the batch's mean power, so that a silent target divides nothing by zero.
    """
    convergence, log_l1 = [], []
    for resolution in RESOLUTIONS:
        ours, theirs = stft_magnitude(audio, *resolution), stft_magnitude(target, *resolution)
        error, power = (jnp.square(x).sum((1, 2)) for x in (ours - theirs, theirs))
        convergence.append(jnp.sqrt(error / power.mean()))
        log_l1.append(jnp.abs(jnp.log(ours) - jnp.log(theirs)).mean((1, 2)))
    return jnp.mean(jnp.stack(convergence), axis=0), jnp.mean(jnp.stack(log_l1), axis=0)


def spectral(mel: Mel, audio: jax.Array, target: jax.Array) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """The generator's spectral loss [B] and its terms with unit weights, name -> ([B], [B]).

    Args:
      mel: whose log magnitudes (nats) the mel loss compares.
      audio: what was generated, [B, samples].
      target: what it should have been, [B, samples].
    """
    log_mel, target_log_mel = (mel.log_magnitude(mel.encode(x)) for x in (audio, target))
    mel_l1 = jnp.abs(log_mel - target_log_mel).mean((1, 2))
    convergence, log_l1 = multi_resolution_stft(audio, target)
    weight = jnp.ones_like(mel_l1)
    terms = dict(mel_l1=mel_l1, spectral_convergence=convergence, log_stft_l1=log_l1)
    return mel_l1 + convergence + log_l1, {name: (term, weight) for name, term in terms.items()}
