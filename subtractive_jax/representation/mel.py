"""Log-mel images: audio to `[n_mels, frames, 1]` in [-1, 1], and back to magnitudes for a vocoder.

Framing follows HiFi-GAN's `meldataset.mel_spectrogram`: no centring, reflect padding of `n_fft - hop_length` samples in
all, so that `samples` give exactly `samples // hop_length` frames and windows tile a song. The filter bank is librosa's
`filters.mel`; the Auffusion preset follows `converter.py` of happylittlecat2333/Auffusion.
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

_SLANEY_STEP_HZ = 200.0 / 3.0  # Slaney's scale is linear up to 1 kHz ...
_SLANEY_BREAK_HZ = 1000.0
_SLANEY_LOG_STEP = math.log(6.4) / 27.0  # ... and logarithmic above it


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


def hann(win_length: int, n_fft: int) -> np.ndarray:
    """A periodic Hann window of `win_length` samples in the middle of `n_fft`, as torch's and librosa's STFT use it."""
    window = np.zeros(n_fft, np.float32)
    start = (n_fft - win_length) // 2
    window[start : start + win_length] = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(win_length) / win_length)
    return window


@dataclasses.dataclass(frozen=True)
class Mel:
    """A log-mel representation. Rates and frequencies in Hz, lengths in samples, `window_frames` in frames."""

    sample_rate: int
    n_fft: int
    win_length: int
    hop_length: int
    n_mels: int
    fmin: float
    fmax: float
    mel_scale: str  # slaney or htk
    mel_norm: str  # slaney or none
    log_floor: float  # the magnitude that maps to -1
    log_ceiling: float  # the magnitude that maps to +1
    window_frames: int
    flip: bool = False  # True: the first row of the image is the highest frequency
    name: str = "mel"

    def __post_init__(self) -> None:
        for field, known in (("name", ("mel",)), ("mel_scale", ("slaney", "htk")), ("mel_norm", ("slaney", "none"))):
            if getattr(self, field) not in known:
                raise unknown_name(f"representation.{field}", str(getattr(self, field)), known)
        if not self.hop_length <= self.win_length <= self.n_fft:
            raise UserError("representation: hop_length <= win_length <= n_fft must hold")
        if not 0.0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise UserError("representation: 0 <= fmin < fmax <= sample_rate / 2 must hold")
        if not 0.0 < self.log_floor < self.log_ceiling:
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
        return self.window_frames * self.hop_length

    def frames(self, samples: int) -> int:
        return samples // self.hop_length

    def samples(self, frames: int) -> int:
        return frames * self.hop_length

    @functools.cached_property
    def _filters(self) -> np.ndarray:
        return mel_filters(
            self.sample_rate, self.n_fft, self.n_mels, self.fmin, self.fmax, self.mel_scale, self.mel_norm
        )

    def encode(self, audio: jax.Array) -> jax.Array:
        """Audio `[..., samples]` float32 to images `[..., n_mels, samples // hop_length, 1]`.

        Magnitudes from `log_floor` to `log_ceiling` become -1 to 1; louder ones exceed 1, quieter ones are clipped.
        """
        padding = self.n_fft - self.hop_length
        widths = [(0, 0)] * (audio.ndim - 1) + [(padding // 2, padding - padding // 2)]
        padded = jnp.pad(audio, widths, mode="reflect")
        frames = self.frames(audio.shape[-1])
        index = np.arange(frames)[:, None] * self.hop_length + np.arange(self.n_fft)[None]
        spectrum = jnp.fft.rfft(padded[..., index] * hann(self.win_length, self.n_fft))
        # The small constant is HiFi-GAN's: it keeps the gradient of the square root finite in silence.
        magnitude = jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + 1e-9)
        return self.image(jnp.einsum("mk,...tk->...mt", self._filters, magnitude))

    def image(self, magnitude: jax.Array) -> jax.Array:
        """Mel magnitudes `[..., n_mels, frames]`, low to high, to images `[..., n_mels, frames, 1]`."""
        low, high = math.log(self.log_floor), math.log(self.log_ceiling)
        log_magnitude = jnp.log(jnp.maximum(magnitude, self.log_floor))
        image = (log_magnitude - low) * (2.0 / (high - low)) - 1.0
        return (image[..., ::-1, :] if self.flip else image)[..., None]

    def log_magnitude(self, image: jax.Array) -> jax.Array:
        """Images `[..., n_mels, frames, 1]` to natural-log mel magnitudes `[..., n_mels, frames]`, low to high."""
        low, high = math.log(self.log_floor), math.log(self.log_ceiling)
        log_magnitude = (image[..., 0] + 1.0) * ((high - low) / 2.0) + low
        return log_magnitude[..., ::-1, :] if self.flip else log_magnitude

    def magnitude(self, image: jax.Array) -> jax.Array:
        """Images `[..., n_mels, frames, 1]` to linear mel magnitudes `[..., n_mels, frames]`, low to high."""
        return jnp.exp(self.log_magnitude(image))


AUFFUSION = Mel(
    sample_rate=16_000,
    n_fft=2048,
    win_length=1024,
    hop_length=160,
    n_mels=256,
    fmin=0.0,
    fmax=8_000.0,
    mel_scale="slaney",
    mel_norm="slaney",
    log_floor=1e-5,
    log_ceiling=200.0,
    window_frames=512,
    flip=True,
)
