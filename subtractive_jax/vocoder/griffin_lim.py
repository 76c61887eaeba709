"""Fast Griffin-Lim (Perraudin, Balazs and Sondergaard 2013): mel images -> audio where no vocoder was trained.

The update rule and the inverse mel scale are torchaudio's `griffinlim` and `InverseMelScale`, as Riffusion uses them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax import rng
from subtractive_jax.errors import UserError
from subtractive_jax.representation.mel import Mel

_WINDOWS_SHARED = 4  # by neighbouring chunks of a song, in STFT windows


def griffin_lim(
    mel: Mel,
    magnitude: jax.Array,
    phasors: jax.Array,
    iterations: int,
    momentum: float,
    known: jax.Array | float = 0.0,
    weight: jax.Array | float = 0.0,
) -> jax.Array:
    """Audio [..., samples] float32 whose STFT has about these magnitudes.

    Args:
      mel: whose `stft` it is.
      magnitude: [..., frames, bins] float32.
      phasors: what the iteration starts from, e^(i phase), [..., frames, bins] complex64.
      iterations: how often the phases are replaced by those of the signal they gave.
      momentum: of the acceleration, in [0, 1); 0 is Griffin and Lim's own algorithm.
      known: audio [..., samples] that the result must agree with; with
      weight: [..., samples] of it, 0 to 1, in every iteration and in the result.
    """

    def signal(phasors: jax.Array) -> jax.Array:
        audio = mel.istft(magnitude * phasors)
        return audio + weight * (known - audio)

    def step(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        phasors, before = state
        spectrum = mel.stft(signal(phasors))
        ahead = spectrum - momentum / (1.0 + momentum) * before
        return ahead / (jnp.abs(ahead) + 1e-16), spectrum

    return signal(jax.lax.fori_loop(0, iterations, step, (phasors, jnp.zeros_like(phasors)))[0])


@dataclasses.dataclass(frozen=True)
class GriffinLim:
    """A vocoder without parameters; the same image always gives the same audio.

    Attributes:
      mel: the images' representation.
      iterations: see `griffin_lim`.
      momentum: see `griffin_lim`.

    Raises:
      UserError: no iterations, or a momentum outside [0, 1).
    """

    mel: Mel
    iterations: int
    momentum: float

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0.0 <= self.momentum < 1.0:
            raise UserError("vocoder: iterations >= 1 and 0 <= momentum < 1 must hold")

    @functools.cached_property
    def _inverse_filters(self) -> np.ndarray:
        """[bins, n_mels] float32: of all magnitudes with the given mel magnitudes those of least norm."""
        return np.linalg.pinv(self.mel.filters.astype(np.float64)).astype(np.float32)

    def linear_magnitude(self, magnitude: jax.Array) -> jax.Array:
        """Mel magnitudes [..., n_mels, frames] to those of the STFT [..., frames, bins]."""
        highest = jax.lax.Precision.HIGHEST
        linear = jnp.einsum("km,...mt->...tk", self._inverse_filters, magnitude, precision=highest)
        return jnp.maximum(linear, 0.0)

    def audio(self, image: jax.Array, known: jax.Array | float = 0.0, weight: jax.Array | float = 0.0) -> jax.Array:
        """An image [n_mels, frames, 1] to audio [samples] float32; the rest as in `griffin_lim`."""
        linear = self.linear_magnitude(self.mel.magnitude(image))
        phases = jax.random.uniform(rng.stream(0, "griffin_lim"), linear.shape, maxval=2.0 * math.pi)
        phasors = jax.lax.complex(jnp.cos(phases), jnp.sin(phases))
        return griffin_lim(self.mel, linear, phasors, self.iterations, self.momentum, known, weight)

    def song(self, image: np.ndarray) -> np.ndarray:
        """An image of any length [n_mels, frames, 1] to audio [samples] float32, in memory for one window.

        In chunks of a window's length. Each is held to the last of what was rendered before it, so that phases go on
        where chunks meet, while its hold fades from 1 to 0.
        """
        mel, frames = self.mel, image.shape[1]
        shared = min(_WINDOWS_SHARED * -(-mel.win_length // mel.hop_length), mel.window_frames // 2)
        distance = mel.window_frames - shared
        chunks = max(1, math.ceil((frames - shared) / distance))
        total = chunks * distance + shared
        padded = np.pad(image, ((0, 0), (0, total - frames), (0, 0)), constant_values=mel.silence)
        audio = np.zeros(mel.samples(total), np.float32)
        hold = np.zeros(mel.window_samples, np.float32)
        for first in range(0, chunks * distance, distance):
            start = first * mel.hop_length
            place = slice(start, start + mel.window_samples)
            audio[place] = self._chunk(padded[:, first : first + mel.window_frames], audio[place], hold)
            hold[: mel.samples(shared)] = np.linspace(1.0, 0.0, mel.samples(shared))
        return audio[: mel.samples(frames)]

    @functools.cached_property
    def _chunk(self) -> jax.stages.Wrapped:
        return jax.jit(self.audio)
