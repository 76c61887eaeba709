"""The denoiser: a text-conditioned UNet over latents [B, F, T, C].

Latent Diffusion (Rombach et al. 2022, arXiv:2112.10752), as diffusers' `UNet2DConditionModel` computes it in Stable
Diffusion 1.x, with its names. In addition, where the config says so: Auffusion's condition adapter between the text
states and the cross-attention, and, ours, a learned token per stem, appended to the text states.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models.cached_attention import RESIDUALS
from subtractive_jax.models.layers import (
    CONVOLUTION,
    Attention,
    Conv,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
    per_block,
)
from subtractive_jax.models.network import Network, Params, normal

_Policy = Callable[..., bool]
_save_names = jax.checkpoint_policies.save_only_these_names
# What the forward pass keeps for the gradient, from most memory to least; the rest is computed again.
REMAT: dict[str, _Policy | None] = {
    "none": None,  # everything
    "products": jax.checkpoint_policies.save_from_both_policies(  # what matrix products, convolutions, attention give
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _save_names(CONVOLUTION, RESIDUALS)
    ),
    "attention": _save_names(RESIDUALS),  # what layers read, and what attention gives
    "layers": jax.checkpoint_policies.nothing_saveable,  # what layers read: about a third more arithmetic
}
_DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # name: has attention
_UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_TRANSFORMER_NORM_EPSILON = 1e-6
_MAX_PERIOD = 10_000
_STEM_EMBEDDING_STD = 0.02
_STEEPNESS, _THRESHOLD = 2.0, 2.5  # of `soft_threshold`, in standard deviations of the noise


def timestep_embedding(timestep: jax.Array, features: int, flip_sin_to_cos: bool, freq_shift: float) -> jax.Array:
    """Sinusoids of the timestep (diffusers' `get_timestep_embedding`): [B] -> [B, features] float32."""
    half = features // 2
    frequencies = jnp.exp(-math.log(_MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    waves = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves, axis=-1)


class _TimestepEmbedding(nnx.Module):
    def __init__(self, in_features: int, features: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(in_features, features, kernel_init=normal(), dtype=dtype, rngs=rngs)
        self.linear_2 = nnx.Linear(features, features, kernel_init=normal(), dtype=dtype, rngs=rngs)

    def __call__(self, waves: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(waves)))


class _GEGLU(nnx.Module):
    def __init__(self, features: int, inner: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = nnx.Linear(features, 2 * inner, kernel_init=normal(), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class _FeedForward(nnx.Module):
    def __init__(self, features: int, dtype: DTypeLike, rngs: nnx.Rngs):
        inner = 4 * features
        # Published names count the dropout between the two as layer 1.
        self.net = nnx.Dict(
            {
                "0": _GEGLU(features, inner, dtype, rngs),
                "2": nnx.Linear(inner, features, kernel_init=normal(), dtype=dtype, rngs=rngs),
            }
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net["2"](self.net["0"](x))


class _TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward: [B, N, C] -> [B, N, C]."""

    def __init__(self, features: int, text_features: int, num_heads: int, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = functools.partial(nnx.LayerNorm, features, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.attn1 = Attention(features, features, num_heads, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(features, text_features, num_heads, dtype=dtype, rngs=rngs)
        self.ff = _FeedForward(features, dtype, rngs)

    def __call__(self, x: jax.Array, text_states: jax.Array, text_mask: jax.Array) -> jax.Array:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), text_states, text_mask)
        return x + self.ff(self.norm3(x))


class _Transformer2D(nnx.Module):
    """diffusers' `Transformer2DModel`: [B, F, T, C] -> [B, F, T, C]."""

    def __init__(self, config: Any, features: int, num_heads: int, num_layers: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = GroupNorm(config.norm_num_groups, features, _TRANSFORMER_NORM_EPSILON, dtype=dtype)
        if config.use_linear_projection:
            projection: functools.partial[Any] = functools.partial(
                nnx.Linear, features, features, kernel_init=normal(), dtype=dtype, rngs=rngs
            )
        else:
            projection = functools.partial(Conv, features, features, (1, 1), dtype=dtype, rngs=rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            _TransformerBlock(features, config.cross_attention_dim, num_heads, dtype, rngs) for _ in range(num_layers)
        )
        self.proj_out = projection()

    def __call__(self, x: jax.Array, text_states: jax.Array, text_mask: jax.Array) -> jax.Array:
        y = self.proj_in(self.norm(x))
        y = y.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            y = block(y, text_states, text_mask)
        return x + self.proj_out(y.reshape(x.shape))


class _Block(nnx.Module):
    """One resolution on the way down or up: resnets, each followed by a transformer if there are any."""

    downsamplers: nnx.List[Downsample2D]  # of all but the last on the way down
    upsamplers: nnx.List[Upsample2D]  # of all but the last on the way up

    def __init__(self, resnets: list[ResnetBlock2D], transformers: list[_Transformer2D]):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(transformers)

    def layer(self, i: int, x: jax.Array, time: jax.Array, text_states: jax.Array, text_mask: jax.Array) -> jax.Array:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, text_states, text_mask) if self.attentions else x

    def layer_with_skip(self, i: int, x: jax.Array, skip: jax.Array, *args: jax.Array) -> jax.Array:
        return self.layer(i, jnp.concatenate([x, skip], axis=-1), *args)


class _ConditionAdapter(nnx.Module):
    """Auffusion's `ConditionAdapter`: states of any text encoder to what the cross-attention reads.

    A text whose states are all zero is Auffusion's null text, which its pipeline puts in after the adapter: it stays
    zero.
    """

    def __init__(self, in_features: int, features: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = nnx.Linear(in_features, features, kernel_init=normal(), dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(features, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, text_states: jax.Array) -> jax.Array:
        is_text = jnp.any(text_states != 0.0, axis=(1, 2), keepdims=True)
        return jnp.where(is_text, self.norm(self.proj(text_states)), 0.0)


class UNet2DConditionModel(nnx.Module):
    """See `denoiser`."""

    def __init__(
        self,
        config: Any,
        in_channels: int,
        out_channels: int,
        num_stems: int,
        dtype: DTypeLike,
        remat: str,
        rngs: nnx.Rngs,
    ):
        widths = tuple(config.block_out_channels)
        num_blocks = len(widths)
        heads = per_block(config.attention_head_dim, num_blocks)
        depths = per_block(config.transformer_layers_per_block, num_blocks)
        down_types = _known_blocks(config.down_block_types, _DOWN_BLOCKS, num_blocks)
        up_types = _known_blocks(config.up_block_types, _UP_BLOCKS, num_blocks)
        time_features = 4 * widths[0]
        conv = functools.partial(Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        resnet = functools.partial(
            ResnetBlock2D,
            num_groups=config.norm_num_groups,
            epsilon=config.norm_eps,
            time_features=time_features,
            dtype=dtype,
            rngs=rngs,
        )

        def transformer(block: int) -> _Transformer2D:
            return _Transformer2D(config, widths[block], heads[block], depths[block], dtype, rngs)

        self.conv_in = conv(in_channels, widths[0])
        self.time_embedding = _TimestepEmbedding(widths[0], time_features, dtype, rngs)
        if config.condition_dim:
            self.condition_adapter = _ConditionAdapter(config.condition_dim, config.cross_attention_dim, dtype, rngs)
        if num_stems:
            embedding_init = normal(_STEM_EMBEDDING_STD)
            self.stem_embedding = nnx.Embed(
                num_stems, config.cross_attention_dim, embedding_init=embedding_init, rngs=rngs
            )

        skips = [widths[0]]
        self.down_blocks: nnx.List[_Block] = nnx.List()
        for i, width in enumerate(widths):
            block = _Block([], [])
            for _ in range(config.layers_per_block):
                block.resnets.append(resnet(skips[-1], width))
                if down_types[i]:
                    block.attentions.append(transformer(i))
                skips.append(width)
            if i < num_blocks - 1:
                block.downsamplers = nnx.List([Downsample2D(width, (1, 1), dtype=dtype, rngs=rngs)])
                skips.append(width)
            self.down_blocks.append(block)

        middle = widths[-1]
        self.mid_block = _Block([resnet(middle, middle), resnet(middle, middle)], [transformer(num_blocks - 1)])

        below = middle
        self.up_blocks: nnx.List[_Block] = nnx.List()
        for i in reversed(range(num_blocks)):
            block = _Block([], [])
            for _ in range(config.layers_per_block + 1):
                block.resnets.append(resnet(below + skips.pop(), widths[i]))
                if up_types[num_blocks - 1 - i]:
                    block.attentions.append(transformer(i))
                below = widths[i]
            if i > 0:
                block.upsamplers = nnx.List([Upsample2D(below, dtype=dtype, rngs=rngs)])
            self.up_blocks.append(block)

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps, dtype=dtype)
        self.conv_out = conv(widths[0], out_channels)
        self.has_adapter, self.num_stems, self.remat = bool(config.condition_dim), num_stems, remat
        self.time_proj = functools.partial(
            timestep_embedding,
            features=widths[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )

    def _run(self, layer: Callable[..., jax.Array], *args: Any) -> jax.Array:
        policy = REMAT[self.remat]
        return (jax.checkpoint(layer, policy=policy) if policy else layer)(*args)

    def __call__(
        self,
        x: jax.Array,
        timestep: jax.Array,
        text_states: jax.Array,
        text_mask: jax.Array,
        stem: jax.Array | None = None,
    ) -> jax.Array:
        time = self.time_embedding(self.time_proj(timestep))
        if self.has_adapter:
            text_states = self.condition_adapter(text_states)
        if self.num_stems and stem is not None:
            token = self.stem_embedding(stem)[:, None].astype(text_states.dtype)
            text_states = jnp.concatenate([text_states, token], axis=1)
            text_mask = jnp.pad(text_mask, ((0, 0), (0, 1)), constant_values=True)

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = self._run(functools.partial(block.layer, i), x, time, text_states, text_mask)
                skips.append(x)
            for downsample in getattr(block, "downsamplers", ()):
                x = downsample(x)
                skips.append(x)

        x = self._run(functools.partial(self.mid_block.layer, 0), x, time, text_states, text_mask)
        x = self._run(self.mid_block.resnets[1], x, time)

        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                layer = functools.partial(block.layer_with_skip, i)
                x = self._run(layer, x, skips.pop(), time, text_states, text_mask)
            for upsample in getattr(block, "upsamplers", ()):
                x = self._run(upsample, x)
        return self._run(self._output, x).astype(jnp.float32)

    def _output(self, x: jax.Array) -> jax.Array:
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


def _known_blocks(names: Any, known: dict[str, bool], num_blocks: int) -> tuple[bool, ...]:
    if len(names) != num_blocks:
        raise UserError(f"denoiser: block types {tuple(names)}, but block_out_channels names {num_blocks} blocks")
    for name in names:
        if name not in known:
            raise unknown_name("denoiser block type", name, known)
    return tuple(known[name] for name in names)


def denoiser(
    config: Any,
    in_channels: int,
    out_channels: int,
    num_stems: int = 0,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
) -> Network:
    """The UNet: `apply(params, x, timestep, text_states, text_mask, stem=None) -> [B, F, T, out_channels]` float32.

    - `x` [B, F, T, in_channels]: noisy latents, with the context's after them if there are any; F and T multiples of
      2^(blocks - 1).
    - `timestep` [B]; `text_states` [B, L, condition_dim or, without an adapter, cross_attention_dim]; `text_mask`
      [B, L] bool, true where they may be looked at.
    - `stem` [B] int32: row of the learned stem token that joins the text states; a model without tokens ignores it.

    Args:
      config: diffusers' `UNet2DConditionModel` fields. As in Stable Diffusion 1.x, `attention_head_dim` is the number
        of heads, given once or once a block. `condition_dim`: width of the text states that the condition adapter
        reads; 0: no adapter.
      num_stems: rows of `stem_embedding`; 0: the published parameters only.
      dtype: what the layers compute in.
      remat: a name in `REMAT`; it changes what a gradient costs, not what it is.

    Raises:
      UserError: an unknown `remat`, unknown block types, or widths that heads or groups do not divide.
    """
    if remat not in REMAT:
        raise unknown_name("remat", remat, REMAT)
    return Network(lambda rngs: UNet2DConditionModel(config, in_channels, out_channels, num_stems, dtype, remat, rngs))


def condition_adapter(config: Any) -> Network:
    """The adapter alone, for a denoiser that gets a new one: its parameters are the denoiser's `condition_adapter`."""
    widths = config.condition_dim, config.cross_attention_dim
    return Network(lambda rngs: _ConditionAdapter(*widths, jnp.float32, rngs))


def soft_threshold(params: Params, channels: int, height: float) -> Params:
    """A fresh denoiser's parameters, changed so that it begins as a soft threshold of its first input channels.

    For data that are zero in nearly all cells and `height` in the others: the best guess is zero until a cell stands
    out of the noise. From LeCun's initial values a denoiser writes zeros for a thousand steps before it finds that out;
    from here, what the last resnet adds is how likely each cell is, which is all that is left to learn.

    Args:
      channels: noisy channels, the first that `conv_in` reads.
    """
    params = jax.tree.map(lambda leaf: leaf, params)  # new dicts
    block = params["up_blocks"][max(params["up_blocks"], key=int)]["resnets"]
    last, width = block[max(block, key=int)], params["conv_in"]["kernel"].shape[-1]
    conv_in, shortcut = params["conv_in"]["kernel"], last["conv_shortcut"]["kernel"]
    params["conv_in"]["kernel"] = conv_in.at[1, 1, :channels].add(jnp.eye(channels, width))
    # The last skip is what conv_in gives, and comes after what the resnets give.
    last["conv_shortcut"]["kernel"] = jnp.zeros_like(shortcut).at[0, 0, -width:].set(jnp.eye(width))
    last["conv2"]["kernel"] = jnp.zeros_like(last["conv2"]["kernel"])
    params["conv_norm_out"]["scale"] = jnp.full(width, _STEEPNESS)
    params["conv_norm_out"]["bias"] = jnp.full(width, -_THRESHOLD * _STEEPNESS)
    through = jnp.zeros_like(params["conv_out"]["kernel"]).at[1, 1].set(jnp.eye(width, channels))
    params["conv_out"]["kernel"] = through * height / (_STEEPNESS * _THRESHOLD)  # twice the threshold becomes height
    return params


def widen_input(params: Params, in_channels: int) -> Params:
    """A denoiser's parameters with more input channels, which it ignores until trained (InstructPix2Pix, section 3.2).

    The new channels come after the old ones and start from zero, so the output stays what it was.
    """
    kernel = params["conv_in"]["kernel"]
    missing = in_channels - kernel.shape[2]
    if missing < 0:
        raise UserError(
            f"denoiser: conv_in has {kernel.shape[2]} input channels, more than the {in_channels} asked for"
        )
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0)))
    return {**params, "conv_in": {**params["conv_in"], "kernel": kernel}}
