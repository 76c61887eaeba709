"""Spectral losses between waveforms, and adversarial losses.

Multi-resolution STFT loss: Parallel WaveGAN (Yamamoto et al. 2020, arXiv:1910.11480), section 3.2, with its settings.
Mel loss: HiFi-GAN (Kong et al. 2020, arXiv:2010.05646), equation 5.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subtractive_jax.models.network import Params
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
        # The floor is for silence that was met exactly, where the square root has no gradient.
        convergence.append(jnp.sqrt(jnp.maximum(error / power.mean(), _POWER_FLOOR)))
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


class Game(NamedTuple):
    """Losses of both players, for scores of any shape; both fall as a player wins.

    Attributes:
      discriminator: of the scores of real and of generated examples.
      generator: of the scores of generated examples.
    """

    discriminator: Callable[[jax.Array, jax.Array], jax.Array]
    generator: Callable[[jax.Array], jax.Array]


LEAST_SQUARES = Game(  # Mao et al. 2017; HiFi-GAN, equations 1 and 2
    lambda real, generated: jnp.square(1.0 - real) + jnp.square(generated),
    lambda generated: jnp.square(1.0 - generated),
)
HINGE = Game(  # Lim and Ye 2017, halved as in VQGAN (Esser et al. 2021) and latent diffusion
    lambda real, generated: (jax.nn.relu(1.0 - real) + jax.nn.relu(1.0 + generated)) / 2.0,
    lambda generated: -generated,
)


def adversarial(
    game: Game,
    discriminate: Callable[[Params, jax.Array], Sequence[Sequence[jax.Array]]],
    params: Params,
    generated: jax.Array,
    real: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The generator's and the discriminators' adversarial losses and feature matching, each [B].

    Means over positions, sums over discriminators and, for feature matching (HiFi-GAN, equation 4), over their layers.
    The first and the last depend on what made `generated` and on no parameter here, the second only on `params`: so
    the gradient of their sum gives each player its own.

    Args:
      discriminate: see `discriminators`.
      params: the discriminators'.
      generated: what was generated, [B, ...].
      real: what it should have been, [B, ...].
    """

    def per_example(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32).reshape(x.shape[0], -1).mean(axis=1)

    of_real = discriminate(params, real)
    # XLA computes the forward pass that the next two share once.
    of_generated = discriminate(params, jax.lax.stop_gradient(generated))
    for_generator = discriminate(jax.lax.stop_gradient(params), generated)
    generator = discriminator = features = jnp.zeros(real.shape[0])
    for true, false, own in zip(of_real, of_generated, for_generator, strict=True):
        generator += per_example(game.generator(own[-1].astype(jnp.float32)))
        discriminator += per_example(game.discriminator(*(x[-1].astype(jnp.float32) for x in (true, false))))
        for there, here in zip(true, own, strict=True):
            features += per_example(jnp.abs(here - jax.lax.stop_gradient(there)))
    return generator, discriminator, features
