"""Vocos (Siuzdak 2023, arXiv:2306.00814): log-mel frames -> audio by an inverse STFT, computed at the rate of frames.

The mel model of github.com/gemelo-ai/vocos (`VocosBackbone`, `ISTFTHead` with padding "same"), with its names.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subtractive_jax.errors import UserError
from subtractive_jax.models.layers import Conv
from subtractive_jax.models.network import Network, normal
from subtractive_jax.representation.stft import inverse_stft

_TAPS = 7  # frames of every convolution
_LOUDEST = math.log(1e2)  # log magnitude that the STFT is clipped at
_STD = 0.02  # of the kernels when training starts


class _DepthwiseConv(nnx.Module):
    """Each channel convolved with its own taps: [B, T, C] -> [B, T, C]. Summed by hand: XLA's is slow on CPUs."""

    def __init__(self, features: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(_STD)(rngs.params(), (_TAPS, 1, features)))
        self.bias = nnx.Param(jnp.zeros(features))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        frames, kernel = x.shape[1], self.kernel[...].astype(self.dtype)
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (_TAPS // 2,) * 2, (0, 0)))
        shifted = (padded[:, tap : tap + frames] * kernel[tap] for tap in range(_TAPS))
        return functools.reduce(jnp.add, shifted) + self.bias[...].astype(self.dtype)


class _ConvNeXtBlock(nnx.Module):
    """A depthwise convolution and two layers over each frame, with a residual."""

    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, kernel_init=normal(_STD), dtype=dtype, rngs=rngs)
        self.dwconv = _DepthwiseConv(config.dim, dtype, rngs)
        self.norm = nnx.LayerNorm(config.dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.pwconv1 = linear(config.dim, config.intermediate_dim)
        self.pwconv2 = linear(config.intermediate_dim, config.dim)
        self.gamma = nnx.Param(jnp.full(config.dim, 1.0 / config.num_layers))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.pwconv1(self.norm(self.dwconv(x)))
        return x + self.gamma[...].astype(self.dtype) * self.pwconv2(jax.nn.gelu(y, approximate=False))


class _Backbone(nnx.Module):
    """[B, T, num_mels] -> [B, T, dim]."""

    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = functools.partial(nnx.LayerNorm, config.dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.embed = Conv(config.num_mels, config.dim, (_TAPS,), dtype=dtype, rngs=rngs)
        self.norm = norm()
        self.convnext = nnx.List(_ConvNeXtBlock(config, dtype, rngs) for _ in range(config.num_layers))
        self.final_layer_norm = norm()

    def __call__(self, log_mel: jax.Array) -> jax.Array:
        x = self.norm(self.embed(log_mel))
        for block in self.convnext:
            x = block(x)
        return self.final_layer_norm(x)


class _Head(nnx.Module):
    """[B, T, dim] -> [B, T * hop_length] float32: log magnitudes and phases of an STFT, and its inverse."""

    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        self.out = nnx.Linear(config.dim, config.n_fft + 2, kernel_init=normal(_STD), dtype=dtype, rngs=rngs)
        self.n_fft, self.hop_length = config.n_fft, config.hop_length

    def __call__(self, x: jax.Array) -> jax.Array:
        log_magnitude, phase = jnp.split(self.out(x).astype(jnp.float32), 2, axis=-1)
        # The original clips the exponential, whose gradient is no number where it overflows.
        magnitude = jnp.exp(jnp.minimum(log_magnitude, _LOUDEST))
        spectrum = jax.lax.complex(magnitude * jnp.cos(phase), magnitude * jnp.sin(phase))
        before, samples = (self.n_fft - self.hop_length) // 2, x.shape[1] * self.hop_length
        return inverse_stft(spectrum, self.n_fft, self.n_fft, self.hop_length, before, samples)


class Vocos(nnx.Module):
    """See `generator`."""

    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        self.backbone = _Backbone(config, dtype, rngs)
        self.head = _Head(config, dtype, rngs)

    def __call__(self, log_mel: jax.Array) -> jax.Array:
        return self.head(self.backbone(log_mel))


def reach(config: Any) -> int:
    """How many frames to either side of a sample its value depends on, at most."""
    return (config.num_layers + 1) * (_TAPS // 2) + -(-config.n_fft // (2 * config.hop_length))


def generator(config: Any, dtype: DTypeLike = jnp.float32) -> Network:
    """The generator: `apply(params, log_mel [B, T, num_mels]) -> audio [B, T * hop_length]` float32.

    `log_mel` is the natural log of mel magnitude.

    Args:
      config: Vocos' config fields: `num_mels` (its `input_channels`), `dim`, `intermediate_dim`, `num_layers`, and
        `n_fft` and `hop_length` of the inverse STFT, in samples.
      dtype: what the layers compute in.

    Raises:
      UserError: an inverse STFT that cannot add up to audio.
    """
    if config.n_fft % 2 or config.hop_length % 2 or config.n_fft < 2 * config.hop_length:
        raise UserError("vocoder: n_fft and hop_length must be even, and n_fft at least twice hop_length")
    return Network(lambda rngs: Vocos(config, dtype, rngs))
