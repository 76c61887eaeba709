"""HiFi-GAN's generator (Kong et al. 2020, arXiv:2010.05646): log-mel frames -> audio.

As github.com/jik876/hifi-gan computes it, with its names. Weight norm is fused: a layer has one kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subtractive_jax.errors import unknown_name
from subtractive_jax.models.layers import Conv, ConvTranspose1d
from subtractive_jax.models.network import Network

REACH = 32  # frames to either side that a sample depends on: 20 in the published shapes

_SLOPE = 0.1
_LAST_SLOPE = 0.01


class _ResBlock1(nnx.Module):
    """Pairs of a dilated and a plain convolution, each pair with a residual."""

    def __init__(self, features: int, size: int, dilations: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs):
        self.convs1 = nnx.List(
            Conv(features, features, (size,), dilation=dilation, dtype=dtype, rngs=rngs) for dilation in dilations
        )
        self.convs2 = nnx.List(Conv(features, features, (size,), dtype=dtype, rngs=rngs) for _ in dilations)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            y = conv1(jax.nn.leaky_relu(x, _SLOPE))
            x = x + conv2(jax.nn.leaky_relu(y, _SLOPE))
        return x


class _ResBlock2(nnx.Module):
    """Dilated convolutions, each with a residual."""

    def __init__(self, features: int, size: int, dilations: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs):
        self.convs = nnx.List(
            Conv(features, features, (size,), dilation=dilation, dtype=dtype, rngs=rngs) for dilation in dilations
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = x + conv(jax.nn.leaky_relu(x, _SLOPE))
        return x


_RESBLOCKS: dict[str, type[_ResBlock1 | _ResBlock2]] = {"1": _ResBlock1, "2": _ResBlock2}


class Generator(nnx.Module):
    """See `generator`."""

    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.upsample_initial_channel
        self.conv_pre = Conv(config.num_mels, width, (7,), dtype=dtype, rngs=rngs)
        self.ups: nnx.List[ConvTranspose1d] = nnx.List()
        self.resblocks: nnx.List[_ResBlock1 | _ResBlock2] = nnx.List()
        for rate, size in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            self.ups.append(ConvTranspose1d(width, width // 2, size, rate, dtype=dtype, rngs=rngs))
            width //= 2
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
                self.resblocks.append(_RESBLOCKS[config.resblock](width, kernel, tuple(dilations), dtype, rngs))
        self.conv_post = Conv(width, 1, (7,), dtype=dtype, rngs=rngs)
        self.blocks_per_rate = len(config.resblock_kernel_sizes)

    def __call__(self, log_mel: jax.Array) -> jax.Array:
        x = self.conv_pre(log_mel)
        for i, up in enumerate(self.ups):
            x = up(jax.nn.leaky_relu(x, _SLOPE))
            blocks = self.resblocks[i * self.blocks_per_rate : (i + 1) * self.blocks_per_rate]
            x = functools.reduce(jnp.add, [block(x) for block in blocks]) / self.blocks_per_rate
        x = self.conv_post(jax.nn.leaky_relu(x, _LAST_SLOPE))
        return jnp.tanh(x[..., 0].astype(jnp.float32))


def generator(config: Any, dtype: DTypeLike = jnp.float32) -> Network:
    """The generator: `apply(params, log_mel [B, T, num_mels]) -> audio [B, T * hop]` float32 in [-1, 1].

    `log_mel` is the natural log of mel magnitude; hop is the product of `upsample_rates`, in samples.

    Args:
      config: HiFi-GAN's config fields.
      dtype: what the layers compute in.

    Raises:
      UserError: an unknown `resblock`, or an upsampling kernel that does not fit its rate.
    """
    if config.resblock not in _RESBLOCKS:
        raise unknown_name("vocoder.resblock", config.resblock, _RESBLOCKS)
    return Network(lambda rngs: Generator(config, dtype, rngs))
