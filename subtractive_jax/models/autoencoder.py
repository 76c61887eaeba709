"""The KL autoencoder: an image of mel bins and frames <-> latents 2^(blocks - 1) times smaller a side.

Latent Diffusion (Rombach et al. 2022, arXiv:2112.10752), as diffusers' `AutoencoderKL` computes it, with its names.
Moments are [B, F, T, 2C]: the posterior's mean, then its log-variance.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subtractive_jax.models.layers import Attention, Conv, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D
from subtractive_jax.models.network import Network

_EPSILON = 1e-6
_LOG_VARIANCE_RANGE = (-30.0, 20.0)


class _SelfAttention(Attention):
    """One head over all positions of the image, with a residual: [B, F, T, C] -> [B, F, T, C]."""

    def __init__(self, features: int, num_groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(features, features, 1, qkv_bias=True, dtype=dtype, rngs=rngs)
        self.group_norm = GroupNorm(num_groups, features, _EPSILON, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        y = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(y, y).reshape(x.shape)


class _MidBlock(nnx.Module):
    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        features = config.block_out_channels[-1]
        resnet = functools.partial(_resnet, config, dtype, rngs)
        self.resnets = nnx.List([resnet(features, features), resnet(features, features)])
        attentions = [_SelfAttention(features, config.norm_num_groups, dtype, rngs)]
        self.attentions = nnx.List(attentions if config.mid_block_add_attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Block(nnx.Module):
    """Resnets, then one resampling, held in the list that diffusers names `resampler`; the last block has none."""

    def __init__(self, resnets: list[ResnetBlock2D], resampler: str, resample: nnx.Module | None):
        self.resnets = nnx.List(resnets)
        if resample is not None:
            setattr(self, resampler, nnx.List([resample]))
        self.resampler = resampler

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in getattr(self, self.resampler, ()):
            x = resample(x)
        return x


def _resnet(config: Any, dtype: DTypeLike, rngs: nnx.Rngs, in_features: int, out_features: int) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_features, out_features, num_groups=config.norm_num_groups, epsilon=_EPSILON, dtype=dtype, rngs=rngs
    )


class _Encoder(nnx.Module):
    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        widths = tuple(config.block_out_channels)
        self.conv_in = conv(config.in_channels, widths[0])
        self.down_blocks: nnx.List[_Block] = nnx.List()
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            resnets = [
                _resnet(config, dtype, rngs, before if j == 0 else width, width) for j in range(config.layers_per_block)
            ]
            last = i == len(widths) - 1
            down = None if last else Downsample2D(width, (0, 1), dtype=dtype, rngs=rngs)
            self.down_blocks.append(_Block(resnets, "downsamplers", down))
        self.mid_block = _MidBlock(config, dtype, rngs)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], _EPSILON, dtype=dtype)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nnx.Module):
    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        widths = tuple(reversed(config.block_out_channels))
        self.conv_in = conv(config.latent_channels, widths[0])
        self.mid_block = _MidBlock(config, dtype, rngs)
        self.up_blocks: nnx.List[_Block] = nnx.List()
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            resnets = [
                _resnet(config, dtype, rngs, before if j == 0 else width, width)
                for j in range(config.layers_per_block + 1)
            ]
            up = None if i == len(widths) - 1 else Upsample2D(width, dtype=dtype, rngs=rngs)
            self.up_blocks.append(_Block(resnets, "upsamplers", up))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], _EPSILON, dtype=dtype)
        self.conv_out = conv(widths[-1], config.out_channels)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """See `kl`."""

    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        latent = config.latent_channels
        self.in_channels = config.in_channels
        self.encoder = _Encoder(config, dtype, rngs)
        self.decoder = _Decoder(config, dtype, rngs)
        self.quant_conv = Conv(2 * latent, 2 * latent, (1, 1), dtype=dtype, rngs=rngs)
        self.post_quant_conv = Conv(latent, latent, (1, 1), dtype=dtype, rngs=rngs)

    def encode(self, x: jax.Array) -> jax.Array:
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(x)).astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_variance, *_LOG_VARIANCE_RANGE)], axis=-1)

    def decode(self, z: jax.Array) -> jax.Array:
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def encode_grey(self, x: jax.Array) -> jax.Array:
        return self.encode(jnp.repeat(x, self.in_channels, axis=-1))

    def decode_grey(self, z: jax.Array) -> jax.Array:
        return self.decode(z)[..., :1]


def kl(config: Any, dtype: DTypeLike = jnp.float32) -> Network:
    """The autoencoder as four methods (`network.apply(params, x, method="encode")`).

    - `encode(x [B, F, T, in_channels]) -> moments [B, F/r, T/r, 2C]` float32, r = 2^(blocks - 1); log-variance clipped
      to [-30, 20].
    - `decode(z [B, F/r, T/r, C]) -> [B, F, T, out_channels]` float32; takes and gives unscaled latents.
    - `encode_grey` and `decode_grey`: the same for images of one channel, which is repeated on entry; of what comes
      back the first channel counts, as in Riffusion and Auffusion.

    Args:
      config: diffusers' `AutoencoderKL` fields; `block_out_channels` decides the number of blocks.
      dtype: what the layers compute in.
    """
    return Network(lambda rngs: AutoencoderKL(config, dtype, rngs))


def mode(moments: jax.Array) -> jax.Array:
    """The posterior's most likely latent: [..., 2C] -> [..., C]."""
    return jnp.split(moments, 2, axis=-1)[0]


def sample_posterior(moments: jax.Array, noise: jax.Array) -> jax.Array:
    """A latent drawn from the posterior with standard normal `noise` [..., C]: [..., 2C] -> [..., C]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * log_variance) * noise


def kl_divergence(moments: jax.Array) -> jax.Array:
    """KL(posterior || standard normal) in nats, summed over each example's latent: [B, F, T, 2C] -> [B]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    terms = jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance
    return 0.5 * terms.sum(axis=(1, 2, 3))
