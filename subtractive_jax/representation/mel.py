"""Mel images: audio to `[n_mels, frames, 1]` in [-1, 1], and back to magnitudes for a vocoder.

One parametrised front end, exact to those of HiFi-GAN (`meldataset.mel_spectrogram` of jik876/hifi-gan), Auffusion
(`converter.py` of happylittlecat2333/Auffusion) and Riffusion (`spectrogram_converter.py` and `image_util.py` of
riffusion/riffusion). The filter bank is librosa's `filters.mel`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.stft import frame, hann, inverse_stft

_SLANEY_STEP_HZ = 200.0 / 3.0  # Slaney's scale is linear up to 1 kHz ...
_SLANEY_BREAK_HZ = 1000.0
_SLANEY_LOG_STEP = math.log(6.4) / 27.0  # ... and logarithmic above it
_QUIETEST = 1e-5  # the magnitude that stands for silence in logarithms of a power law's magnitudes


def _hz_to_mel(hz: np.ndarray, scale: str) -> np.ndarray:
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + hz / 700.0)
    log_part = np.log(np.maximum(hz, _SLANEY_BREAK_HZ) / _SLANEY_BREAK_HZ) / _SLANEY_LOG_STEP
    return np.minimum(hz, _SLANEY_BREAK_HZ) / _SLANEY_STEP_HZ + log_part


def _mel_to_hz(mel: np.ndarray, scale: str) -> np.ndarray:
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    break_mel = _SLANEY_BREAK_HZ / _SLANEY_STEP_HZ
    return np.minimum(mel, break_mel) * _SLANEY_STEP_HZ * np.exp(np.maximum(mel - break_mel, 0.0) * _SLANEY_LOG_STEP)


def mel_filters(
    sample_rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float, scale: str = "slaney", norm: str = "slaney"
) -> np.ndarray:
    """Triangular filters `[n_mels, n_fft // 2 + 1]` float32, as librosa's `filters.mel`.

    Args:
      scale: `slaney` (linear, then logarithmic) or `htk`.
      norm: `slaney` (every filter has the same area) or `none`.
    """
    bins = np.linspace(0.0, sample_rate / 2.0, n_fft // 2 + 1)
    low, high = _hz_to_mel(np.array([fmin, fmax]), scale)
    edges = _mel_to_hz(np.linspace(low, high, n_mels + 2), scale)
    rising = (bins[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins[None]) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if norm == "slaney":
        filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return filters.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Mel:
    """A mel representation. Rates and frequencies in Hz, lengths in samples, `window_frames` in frames.

    Magnitudes become image values in [-1, 1] by one of two compressions. Both clip at their ends, in both directions,
    as the published pipelines do:

    - logarithm: `log_floor` maps to -1, `log_ceiling` to +1.
    - power law: 0 maps to -1, `power_ceiling` to +1, and `(magnitude / power_ceiling) ** power_exponent` lies evenly
      between. Riffusion divides each image by its own maximum, which loses the level between mix and context; one
      ceiling for all keeps it. Its published decoding maximum, 30e6 for samples in the range of int16, is
      30e6 / 32768 for ours in [-1, 1].

    Attributes:
      framing: "hifigan": no centring, reflect padding of `n_fft - hop_length` samples in all, so that windows tile a
        song; HiFi-GAN's 1e-9 under the square root. "centered": torch.stft's `center=True`, the first frame is centred
        on the first sample and the last on the last; plain magnitudes.
      inverted: silence is +1 instead of -1.
      flip: the first row of the image is the highest frequency.
    """

    sample_rate: int
    n_fft: int
    win_length: int
    hop_length: int
    n_mels: int
    fmin: float
    fmax: float
    mel_scale: str  # slaney or htk
    mel_norm: str  # slaney or none
    window_frames: int
    framing: str = "hifigan"
    log_floor: float = 0.0  # these two and 0.0 for the next two, or the other way round
    log_ceiling: float = 0.0
    power_exponent: float = 0.0
    power_ceiling: float = 0.0
    inverted: bool = False
    flip: bool = False
    name: str = "mel"

    def __post_init__(self) -> None:
        for field, known in (
            ("name", ("mel",)),
            ("mel_scale", ("slaney", "htk")),
            ("mel_norm", ("slaney", "none")),
            ("framing", ("hifigan", "centered")),
        ):
            if getattr(self, field) not in known:
                raise unknown_name(f"representation.{field}", str(getattr(self, field)), known)
        if not self.hop_length <= self.win_length <= self.n_fft:
            raise UserError("representation: hop_length <= win_length <= n_fft must hold")
        if not 0.0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise UserError("representation: 0 <= fmin < fmax <= sample_rate / 2 must hold")
        power_law = any((self.power_exponent, self.power_ceiling))
        if power_law == any((self.log_floor, self.log_ceiling)):
            raise UserError(
                "representation: give either log_floor and log_ceiling, or power_exponent and power_ceiling"
            )
        if power_law and not (self.power_exponent > 0.0 and self.power_ceiling > 0.0):
            raise UserError("representation: power_exponent > 0 and power_ceiling > 0 must hold")
        if not power_law and not 0.0 < self.log_floor < self.log_ceiling:
            raise UserError("representation: 0 < log_floor < log_ceiling must hold")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Mel":
        """Builds from `config.representation` or from the `representation` of a dataset's or model's metadata.

        Raises:
          UserError: a field is unknown or missing, or a value is out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in config:
            if key not in fields:
                raise unknown_name("representation field", key, fields)
        for key, field in fields.items():
            if field.default is dataclasses.MISSING and key not in config:
                raise UserError(f'representation: the field "{key}" is missing')
        return cls(**{key: config[key] for key in config})

    @property
    def window_samples(self) -> int:
        """Length of a window; windows start `window_frames * hop_length` apart where they follow one another."""
        return self.samples(self.window_frames)

    @property
    def silence(self) -> float:
        """The image's value where nothing is heard."""
        return 1.0 if self.inverted else -1.0

    def frames(self, samples: int) -> int:
        """How many frames `samples` give."""
        return samples // self.hop_length + (self.framing == "centered")

    def samples(self, frames: int) -> int:
        """The fewest samples that give `frames`."""
        return (frames - (self.framing == "centered")) * self.hop_length

    @functools.cached_property
    def filters(self) -> np.ndarray:
        """Mel filters [n_mels, bins] float32 over the STFT's bins up to `fmax`."""
        filters = mel_filters(
            self.sample_rate, self.n_fft, self.n_mels, self.fmin, self.fmax, self.mel_scale, self.mel_norm
        )
        return filters[:, : int(self.fmax * self.n_fft / self.sample_rate) + 1]

    @property
    def _samples_before(self) -> int:
        """How far the first frame's window reaches beyond the signal's start."""
        padding = self.n_fft if self.framing == "centered" else self.n_fft - self.hop_length
        return padding // 2 - (self.n_fft - self.win_length) // 2

    def stft(self, audio: jax.Array) -> jax.Array:
        """Audio [..., samples] to spectra [..., frames, bins] complex64 up to `fmax`, the signal reflected at its ends.

        Phases count from the first of a frame's `win_length` samples; torch's and librosa's from the first of `n_fft`.
        """
        samples, before = audio.shape[-1], self._samples_before
        after = (self.frames(samples) - 1) * self.hop_length + self.win_length - before - samples
        widths = [(0, 0)] * (audio.ndim - 1) + [(before, max(0, after))]
        framed = frame(jnp.pad(audio, widths, mode="reflect"), self.win_length, self.hop_length)
        return jnp.fft.rfft(framed * hann(self.win_length), self.n_fft)[..., : self.filters.shape[1]]

    def istft(self, spectrum: jax.Array) -> jax.Array:
        """Spectra [..., frames, bins] to the audio [..., samples] whose `stft` is nearest, see `inverse_stft`."""
        before, samples = self._samples_before, self.samples(spectrum.shape[-2])
        return inverse_stft(spectrum, self.n_fft, self.win_length, self.hop_length, before, samples)

    def encode(self, audio: jax.Array) -> jax.Array:
        """Audio `[..., samples]` float32 to images `[..., n_mels, frames, 1]`."""
        spectrum = self.stft(audio)
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        if self.framing == "hifigan":
            power += 1e-9  # it keeps the gradient of the square root finite in silence
        # The default precision of accelerators would cost the parity with the published front ends.
        highest = jax.lax.Precision.HIGHEST
        return self.image(jnp.einsum("mk,...tk->...mt", self.filters, jnp.sqrt(power), precision=highest))

    def image(self, magnitude: jax.Array) -> jax.Array:
        """Mel magnitudes `[..., n_mels, frames]`, low to high, to images `[..., n_mels, frames, 1]` in [-1, 1]."""
        if self.power_exponent:
            image = 2.0 * (magnitude / self.power_ceiling) ** self.power_exponent - 1.0
        else:
            low, high = math.log(self.log_floor), math.log(self.log_ceiling)
            image = (jnp.log(jnp.maximum(magnitude, self.log_floor)) - low) * (2.0 / (high - low)) - 1.0
        image = jnp.clip(image, -1.0, 1.0) * -self.silence
        return (image[..., ::-1, :] if self.flip else image)[..., None]

    def _level(self, image: jax.Array) -> jax.Array:
        """Images `[..., n_mels, frames, 1]` to `[..., n_mels, frames]`, low to high: 0 is silence, 1 the ceiling."""
        level = (1.0 - self.silence * jnp.clip(image[..., 0], -1.0, 1.0)) / 2.0
        return level[..., ::-1, :] if self.flip else level

    def log_magnitude(self, image: jax.Array) -> jax.Array:
        """Images `[..., n_mels, frames, 1]` to natural-log mel magnitudes `[..., n_mels, frames]`, low to high.

        From `log_floor` up; with a power law from 1e-5 up.
        """
        if self.power_exponent:
            return jnp.log(jnp.maximum(self.magnitude(image), _QUIETEST))
        low, high = math.log(self.log_floor), math.log(self.log_ceiling)
        return self._level(image) * (high - low) + low

    def magnitude(self, image: jax.Array) -> jax.Array:
        """Images `[..., n_mels, frames, 1]` to linear mel magnitudes `[..., n_mels, frames]`, low to high."""
        if self.power_exponent:
            return self.power_ceiling * self._level(image) ** (1.0 / self.power_exponent)
        return jnp.exp(self.log_magnitude(image))
