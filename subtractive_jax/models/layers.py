"""Layers shared by the models, channels last, with the numerics of their PyTorch originals.

Parameters are float32; `dtype` is what a layer computes in, except statistics and softmax, which are float32 always.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from subtractive_jax.errors import UserError
from subtractive_jax.models.fused_attention import attend
from subtractive_jax.models.network import normal

CONVOLUTION = "convolution"  # what policies of rematerialisation call the output of a `Conv`
_Padding = tuple[tuple[int, int], ...]
_MAX_POSITIONS = 32_768  # outputs that XLA's CPU convolution sums over before it falls out of the cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, padding: _Padding) -> jax.Array:
    """[B, *space, in], [*size, in, out] -> [B, *space, out], with a kernel gradient that is fast on CPUs too."""
    space = "HW"[-len(padding) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,) * len(space),
        padding=padding,
        rhs_dilation=(dilation,) * len(space),
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
    )


def _convolve_forward(
    x: jax.Array, kernel: jax.Array, stride: int, dilation: int, padding: _Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x, kernel, stride, dilation, padding), (x, kernel)


def _convolve_backward(
    stride: int, dilation: int, padding: _Padding, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals

    def kernel_gradient(x: jax.Array, dy: jax.Array, padding: _Padding = padding) -> jax.Array:
        return jax.vjp(lambda kernel: convolve.fun(x, kernel, stride, dilation, padding), kernel)[1](dy)[0]

    def in_slices(x: jax.Array, dy: jax.Array) -> jax.Array:
        # A sum over slices of the first spatial axis: batches may be sharded, and XLA's CPU convolutions are slow in
        # loops.
        length = dy.shape[1]
        slices = min(length, -(-dy[..., 0].size // _MAX_POSITIONS))
        x = jnp.pad(x, ((0, 0), padding[0], *((0, 0),) * (x.ndim - 2)))
        reach = dilation * (kernel.shape[0] - 1) + 1
        bounds = [length * i // slices for i in range(slices + 1)]
        gradients = (
            kernel_gradient(
                x[:, start * stride : (stop - 1) * stride + reach], dy[:, start:stop], ((0, 0), *padding[1:])
            )
            for start, stop in itertools.pairwise(bounds)
        )
        return functools.reduce(jnp.add, gradients)

    dx = jax.vjp(lambda x: convolve.fun(x, kernel, stride, dilation, padding), x)[1](dy)[0]
    return dx, jax.lax.platform_dependent(x, dy, cpu=in_slices, default=kernel_gradient)


convolve.defvjp(_convolve_forward, _convolve_backward)


class Conv(nnx.Module):
    """Convolution over `len(kernel_size)` spatial axes: [B, *space, in] -> [B, *space, out].

    Args:
      padding: `(low, high)` per spatial axis; default: what keeps the size at stride 1 with an odd kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, ...],
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: _Padding | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(normal()(rngs.params(), (*kernel_size, in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.padding = padding or tuple((dilation * (size - 1) // 2,) * 2 for size in kernel_size)
        self.stride, self.dilation, self.dtype = stride, dilation, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        y = convolve(x.astype(self.dtype), kernel, self.stride, self.dilation, self.padding)
        return checkpoint_name(y + self.bias[...].astype(self.dtype), CONVOLUTION)


class ConvTranspose1d(nnx.Module):
    """Transposed convolution that multiplies the length by `stride`: [B, T, in] -> [B, T * stride, out].

    PyTorch's `ConvTranspose1d(in, out, k, stride, padding=(k - stride) // 2)`. The kernel is stored as that of the
    convolution it transposes, [k, out, in]. Computed as an ordinary convolution that emits `stride` samples a step.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        stride: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kernel_size < stride or (kernel_size - stride) % 2:
            raise UserError(
                f"vocoder: upsample_kernel_sizes {kernel_size} for upsample_rates {stride}: "
                "the kernel must be longer than the rate by an even number"
            )
        taps_per_sample = kernel_size / stride
        scale = normal((taps_per_sample * in_features) ** -0.5)
        self.kernel = nnx.Param(scale(rngs.params(), (kernel_size, out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        size, out_features, in_features = kernel.shape
        batch, length, _ = x.shape
        steps = -(-size // self.stride)
        kernel = jnp.pad(kernel, ((0, steps * self.stride - size), (0, 0), (0, 0)))
        phases = kernel.reshape(steps, self.stride * out_features, in_features)[::-1].swapaxes(1, 2)
        y = convolve(x.astype(self.dtype), phases, 1, 1, ((steps - 1, steps - 1),))
        y = y.reshape(batch, -1, out_features)
        start = (size - self.stride) // 2
        return y[:, start : start + length * self.stride] + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation over all axes but the first: [B, ..., C] -> [B, ..., C]."""

    def __init__(self, num_groups: int, num_channels: int, epsilon: float, *, dtype: DTypeLike = jnp.float32):
        if num_channels % num_groups:
            raise UserError(f"norm_num_groups {num_groups} does not divide {num_channels} channels: change either")
        self.scale = nnx.Param(jnp.ones(num_channels))
        self.bias = nnx.Param(jnp.zeros(num_channels))
        self.num_groups, self.epsilon, self.dtype = num_groups, epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, channels = x.shape[0], x.shape[-1]
        space = tuple(range(1, x.ndim - 1))
        x = x.astype(jnp.float32)

        def per_group(moment: jax.Array) -> jax.Array:
            moment = moment.reshape(batch, self.num_groups, -1).mean(-1, keepdims=True)
            moment = jnp.broadcast_to(moment, (batch, self.num_groups, channels // self.num_groups))
            return moment.reshape(batch, *(1,) * len(space), channels)

        # Channel sums first: they vectorise, and what is left is one multiply-add a value.
        mean = per_group(x.mean(space))
        variance = per_group(jnp.square(x).mean(space)) - jnp.square(mean)
        gain = self.scale[...] * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + self.epsilon)
        return (x * gain + (self.bias[...] - mean * gain)).astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head attention with diffusers' names: [B, N, C], [B, M, context] -> [B, N, C].

    Args:
      qkv_bias: whether `to_q`, `to_k`, `to_v` have a bias (the autoencoder's do, the UNet's do not).
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise UserError(f"attention_head_dim {num_heads} (number of heads) does not divide {features} channels")
        linear = functools.partial(nnx.Linear, kernel_init=normal(), dtype=dtype, rngs=rngs)
        self.to_q = linear(features, features, use_bias=qkv_bias)
        self.to_k = linear(context_features, features, use_bias=qkv_bias)
        self.to_v = linear(context_features, features, use_bias=qkv_bias)
        self.to_out = nnx.List([linear(features, features)])
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`mask` [B, M] is true where `context` may be looked at; None: everywhere."""
        q, k, v = (
            y.reshape(*y.shape[:-1], self.num_heads, -1) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attend(q, k, v, mask).reshape(x.shape))


class ResnetBlock2D(nnx.Module):
    """diffusers' `ResnetBlock2D`: [B, F, T, in] (and the time embedding [B, E], if any) -> [B, F, T, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_groups: int,
        epsilon: float,
        time_features: int | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(Conv, dtype=dtype, rngs=rngs)
        self.norm1 = GroupNorm(num_groups, in_features, epsilon, dtype=dtype)
        self.conv1 = conv(in_features, out_features, (3, 3))
        if time_features is not None:
            self.time_emb_proj = nnx.Linear(time_features, out_features, kernel_init=normal(), dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(num_groups, out_features, epsilon, dtype=dtype)
        self.conv2 = conv(out_features, out_features, (3, 3))
        self.conv_shortcut = conv(in_features, out_features, (1, 1)) if in_features != out_features else None

    def __call__(self, x: jax.Array, time_embedding: jax.Array | None = None) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if time_embedding is not None:
            y = y + self.time_emb_proj(jax.nn.silu(time_embedding))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """Halves both axes. The autoencoder pads only the high side, the UNet both."""

    def __init__(self, features: int, padding: tuple[int, int], *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(features, features, (3, 3), stride=2, padding=(padding, padding), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles both axes: nearest neighbour, then a convolution."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(features, features, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


def per_block(value: int | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """A config value given once, or once a block."""
    values = (value,) * num_blocks if isinstance(value, int) else tuple(value)
    if len(values) != num_blocks:
        raise UserError(f"{values} names {len(values)} blocks, the model has {num_blocks}")
    return values
