"""Discriminators for adversarial training: of waveforms for the vocoder, of mel images for the autoencoder.

Names are those of the PyTorch originals; weight norm is fused, as in the generator. A discriminator gives the outputs
of all its layers, for feature matching; the last are its scores. Models do not keep discriminators.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subtractive_jax.models.layers import Conv, GroupNorm, convolve
from subtractive_jax.models.network import Network
from subtractive_jax.vocoder.losses import RESOLUTIONS, stft_magnitude

PERIODS = (2, 3, 5, 7, 11)  # samples
SMALLEST_IMAGE = 24  # rows and columns, of which `patch` makes one score
_PERIOD_SLOPE = 0.1
_SPECTRAL_SLOPE = 0.2
_PATCH_SLOPE = 0.2

Features = list[jax.Array]  # [B, ..., C] of each layer; the last are the scores, [B, ..., 1]


class _PeriodDiscriminator(nnx.Module):
    """Audio [B, samples] to features [B, period, T, C]: each phase of the period is a signal of its own."""

    def __init__(self, period: int, channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        # Published kernels have a second spatial axis of size 1; without it the phases are examples of a batch.
        widths = (1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels)
        self.convs = nnx.List(
            Conv(widths[i], widths[i + 1], (5,), stride=3 if i < 4 else 1, dtype=dtype, rngs=rngs) for i in range(5)
        )
        self.conv_post = Conv(widths[-1], 1, (3,), dtype=dtype, rngs=rngs)
        self.period = period

    def __call__(self, audio: jax.Array) -> Features:
        batch, samples = audio.shape
        audio = jnp.pad(audio, ((0, 0), (0, -samples % self.period)), mode="reflect")
        x = audio.reshape(batch, -1, self.period).swapaxes(1, 2).reshape(batch * self.period, -1, 1)
        features = []
        for conv in self.convs:
            x = jax.nn.leaky_relu(conv(x), _PERIOD_SLOPE)
            features.append(x)
        features.append(self.conv_post(x))
        return [y.reshape(batch, self.period, *y.shape[1:]) for y in features]


class MultiPeriodDiscriminator(nnx.Module):
    """HiFi-GAN's (Kong et al. 2020, arXiv:2010.05646, section 2.3), as github.com/jik876/hifi-gan computes it."""

    def __init__(self, channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.discriminators = nnx.List(_PeriodDiscriminator(period, channels, dtype, rngs) for period in PERIODS)

    def __call__(self, audio: jax.Array) -> list[Features]:
        return [discriminator(audio) for discriminator in self.discriminators]


class _HalvingConv(Conv):
    """A convolution that takes every second position of its last axis: [B, F, T, in] -> [B, F, ceil(T / 2), out].

    Computed as one without stride over pairs of positions: on CPUs its gradient is 2.7 times as fast.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, rows, length, features = x.shape
        rows_padding, (before, _) = self.padding
        kernel = self.kernel[...].astype(self.dtype)
        kernel = jnp.pad(kernel, ((0, 0), (0, kernel.shape[1] % 2), (0, 0), (0, 0)))
        height, taps, _, out_features = kernel.shape
        kernel = kernel.reshape(height, taps // 2, 2 * features, out_features)
        pairs = -(-length // 2) + taps // 2 - 1
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, 0), (before, 2 * pairs - length - before), (0, 0)))
        y = convolve(x.reshape(batch, rows, pairs, 2 * features), kernel, 1, 1, (rows_padding, (0, 0)))
        return y + self.bias[...].astype(self.dtype)


class _ResolutionDiscriminator(nnx.Module):
    """Audio [B, samples] to features [B, F, T, C] of its STFT magnitudes."""

    def __init__(self, resolution: tuple[int, int, int], channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.convs: nnx.List[Conv] = nnx.List([Conv(1, channels, (3, 9), dtype=dtype, rngs=rngs)])
        for _ in range(3):
            self.convs.append(_HalvingConv(channels, channels, (3, 9), dtype=dtype, rngs=rngs))
        self.convs.append(Conv(channels, channels, (3, 3), dtype=dtype, rngs=rngs))
        self.conv_post = Conv(channels, 1, (3, 3), dtype=dtype, rngs=rngs)
        self.resolution = resolution

    def __call__(self, audio: jax.Array) -> Features:
        x = stft_magnitude(audio, *self.resolution).swapaxes(1, 2)[..., None]
        features = []
        for conv in self.convs:
            x = jax.nn.leaky_relu(conv(x), _SPECTRAL_SLOPE)
            features.append(x)
        return [*features, self.conv_post(x)]


class MultiResolutionDiscriminator(nnx.Module):
    """UnivNet's (Jang et al. 2021, arXiv:2106.07889, section 2.2), which BigVGAN uses too.

    It sees the Hann-windowed magnitudes that the spectral loss compares; published code has no window.
    """

    def __init__(self, channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.discriminators = nnx.List(_ResolutionDiscriminator(item, channels, dtype, rngs) for item in RESOLUTIONS)

    def __call__(self, audio: jax.Array) -> list[Features]:
        return [discriminator(audio) for discriminator in self.discriminators]


class _AudioDiscriminators(nnx.Module):
    """See `audio`."""

    def __init__(self, channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.mpd = MultiPeriodDiscriminator(channels, dtype, rngs)
        self.mrd = MultiResolutionDiscriminator(channels, dtype, rngs)

    def __call__(self, audio: jax.Array) -> list[Features]:
        return [*self.mpd(audio), *self.mrd(audio)]


def audio(channels: int, dtype: DTypeLike = jnp.float32) -> Network:
    """Multi-period and multi-resolution: `apply(params, audio [B, samples]) -> features of eight discriminators`.

    Args:
      channels: of the first layers; 32 are published.
      dtype: what the layers compute in.
    """
    return Network(lambda rngs: _AudioDiscriminators(channels, dtype, rngs))


class _PatchDiscriminator(nnx.Module):
    """See `patch`."""

    def __init__(self, channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        def conv(in_features: int, out_features: int, stride: int) -> Conv:
            padding = ((1, 1), (1, 1))
            return Conv(in_features, out_features, (4, 4), stride=stride, padding=padding, dtype=dtype, rngs=rngs)

        self.main = nnx.Dict({"0": conv(1, channels, 2), "11": conv(8 * channels, 1, 1)})
        for i, (factor, stride) in enumerate(((1, 2), (2, 2), (4, 1))):
            width = 2 * factor * channels
            self.main[str(3 * i + 2)] = conv(factor * channels, width, stride)
            self.main[str(3 * i + 3)] = GroupNorm(width // channels, width, 1e-5, dtype=dtype)

    def __call__(self, image: jax.Array) -> list[Features]:
        features = [jax.nn.leaky_relu(self.main["0"](image), _PATCH_SLOPE)]
        for i in (2, 5, 8):
            y = self.main[str(i + 1)](self.main[str(i)](features[-1]))
            features.append(jax.nn.leaky_relu(y, _PATCH_SLOPE))
        return [[*features, self.main["11"](features[-1])]]


def patch(channels: int, dtype: DTypeLike = jnp.float32) -> Network:
    """pix2pix's 70 x 70 discriminator (Isola et al. 2017): `apply(params, image [B, F, T, 1]) -> features of one`.

    The layers of latent diffusion's `NLayerDiscriminator`, but with group norm, a group for each `channels`: the
    statistics of batch norm would make the loss of an example depend on how its batch is split. So convolutions keep
    their bias.

    Args:
      channels: of the first layer; 64 are published.
      dtype: what the layers compute in.
    """
    return Network(lambda rngs: _PatchDiscriminator(channels, dtype, rngs))
