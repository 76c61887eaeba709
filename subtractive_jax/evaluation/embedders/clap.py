"""CLAP (Wu et al. 2023) without fusion: recordings and texts in one space, as transformers' `ClapModel`.

HTS-AT (Chen et al. 2022), a Swin transformer over the log-mel image, reads recordings; RoBERTa reads texts.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from tokenizers import Tokenizer

from subtractive_jax.errors import UserError
from subtractive_jax.evaluation.embedders.embedding import (
    Embedding,
    Params,
    batch_norm,
    convolution,
    in_batches,
    installed_weights,
    linear,
    read_weights,
)
from subtractive_jax.representation.audio import resample
from subtractive_jax.representation.mel import mel_filters
from subtractive_jax.representation.stft import hann

NAME = "clap"
_AUDIO, _TEXT = "audio_model.audio_encoder", "text_model"
_PATCH = 4  # bins and frames of the image
_MAX_TOKENS = 77  # of laion_clap
_BICUBIC = -0.75  # PyTorch's


@dataclasses.dataclass(frozen=True)
class Config:
    """What differs between published checkpoints.

    Attributes:
      depths, heads: of HTS-AT's stages.
      width: channels of its first stage.
      window_size: patches a side that attend to one another.
      spec_size: bins and frames of the square image.
      n_mels: mel bins.
      fmin, fmax: in Hz.
      text_layers, text_heads: of RoBERTa.
      text_norm_eps: of its layer norms.
      pad_token_id: of its tokenizer.
    """

    depths: tuple[int, ...]
    heads: tuple[int, ...]
    width: int
    window_size: int
    spec_size: int
    n_mels: int
    fmin: float
    fmax: float
    text_layers: int
    text_heads: int
    text_norm_eps: float
    pad_token_id: int

    @classmethod
    def from_json(cls, text: str) -> "Config":
        fields: dict[str, Any] = json.loads(text)
        fields |= {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters that do not follow from one another."""
        last = self.width * 2 ** (len(self.depths) - 1)
        return {
            f"{_AUDIO}.batch_norm.running_mean": (self.n_mels,),
            f"{_AUDIO}.patch_embed.proj.weight": (self.width, 1, _PATCH, _PATCH),
            f"{_AUDIO}.norm.weight": (last,),
            **{
                f"{_AUDIO}.layers.{stage}.blocks.{depth - 1}.attention.self.relative_position_bias_table": (
                    (2 * self.window_size - 1) ** 2,
                    heads,
                )
                for stage, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True))
            },
        }


def _layer_norm(params: Params, name: str, x: jax.Array, eps: float = 1e-5) -> jax.Array:
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps) * params[f"{name}.weight"] + params[f"{name}.bias"]


def _attention(params: Params, name: str, x: jax.Array, heads: int, bias: jax.Array) -> jax.Array:
    """Self-attention of `[..., tokens, channels]`; `bias` is added to the scores `[..., heads, tokens, tokens]`."""
    split = (*x.shape[:-1], heads, x.shape[-1] // heads)
    q, k, v = (linear(params, f"{name}.self.{part}", x).reshape(split) for part in ("query", "key", "value"))
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(split[-1])
    mixed = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores + bias, axis=-1), v)
    return linear(params, f"{name}.output.dense", mixed.reshape(x.shape))


def _feed_forward(params: Params, name: str, x: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(linear(params, f"{name}.intermediate.dense", x), approximate=False)
    return linear(params, f"{name}.output.dense", hidden)


def _projected(params: Params, name: str, x: jax.Array) -> jax.Array:
    x = linear(params, f"{name}.linear2", jax.nn.relu(linear(params, f"{name}.linear1", x)))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _interpolation(outputs: int, inputs: int) -> np.ndarray:
    """`[outputs, inputs]`: PyTorch's bicubic interpolation with aligned corners."""
    matrix = np.zeros((outputs, inputs), np.float32)
    places = np.arange(outputs) * (inputs - 1) / max(outputs - 1, 1)
    for output, place in enumerate(places):
        for tap in range(-1, 3):
            away = abs(place - math.floor(place) - tap)
            if away <= 1.0:
                weight = ((_BICUBIC + 2.0) * away - (_BICUBIC + 3.0)) * away**2 + 1.0
            else:
                weight = ((_BICUBIC * away - 5.0 * _BICUBIC) * away + 8.0 * _BICUBIC) * away - 4.0 * _BICUBIC
            matrix[output, min(max(math.floor(place) + tap, 0), inputs - 1)] += weight
    return matrix


def _relative_positions(size: int) -> np.ndarray:
    """Rows of the bias table for pairs of a window's places `[size², size²]`."""
    rows, columns = (axis.reshape(-1) for axis in np.mgrid[:size, :size])
    return (rows[:, None] - rows + size - 1) * (2 * size - 1) + columns[:, None] - columns + size - 1


def _windows(x: Any, size: int) -> Any:
    """`[B, side, side, channels]`, of numpy or JAX, to `[B, windows, size², channels]`."""
    batch, side, _, channels = x.shape
    x = x.reshape(batch, side // size, size, side // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size, channels)


def _from_windows(x: jax.Array, size: int, side: int) -> jax.Array:
    """The inverse of `_windows`."""
    x = x.reshape(len(x), side // size, side // size, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), side, side, -1)


def _foreign(side: int, size: int, shift: int) -> np.ndarray:
    """Scores' bias `[windows, 1, size², size²]`: -100 between places that only the cyclic shift brought together."""
    place = np.arange(side)
    region = (place >= side - size).astype(int) + (place >= side - shift)
    regions = _windows((3 * region[:, None] + region)[None, ..., None], size)[0, ..., 0]
    return np.where(regions[:, :, None] != regions[:, None], -100.0, 0.0).astype(np.float32)[:, None]


def _block(params: Params, name: str, x: jax.Array, heads: int, size: int, shift: int) -> jax.Array:
    """A Swin block on `[B, side, side, channels]` with windows of `size` places a side."""
    side = x.shape[1]
    table = params[f"{name}.attention.self.relative_position_bias_table"]
    bias = table[_relative_positions(size)].transpose(2, 0, 1)
    y = jnp.roll(_layer_norm(params, f"{name}.layernorm_before", x), (-shift, -shift), axis=(1, 2))
    if shift:
        bias = bias + _foreign(side, size, shift)
    y = _from_windows(_attention(params, f"{name}.attention", _windows(y, size), heads, bias), size, side)
    x = x + jnp.roll(y, (shift, shift), axis=(1, 2))
    return x + _feed_forward(params, name, _layer_norm(params, f"{name}.layernorm_after", x))


@functools.partial(jax.jit, static_argnames="config")
def embed_log_mel(params: Params, log_mel: jax.Array, config: Config) -> jax.Array:
    """Log-mel images `[B, frames, n_mels]` to unit vectors `[B, D]`."""
    batch, frames, n_mels = log_mel.shape
    fold = config.spec_size // n_mels
    x = batch_norm(params, f"{_AUDIO}.batch_norm", log_mel)
    x = jnp.asarray(_interpolation(config.spec_size * fold, frames)) @ x
    x = x.reshape(batch, fold, config.spec_size, n_mels).swapaxes(2, 3)
    x = x.reshape(batch, config.spec_size, config.spec_size, 1)
    x = convolution(params, f"{_AUDIO}.patch_embed.proj", x, stride=_PATCH)
    x = _layer_norm(params, f"{_AUDIO}.patch_embed.norm", x)
    for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
        name, size = f"{_AUDIO}.layers.{stage}", min(config.window_size, x.shape[1])
        for index in range(depth):
            shift = size // 2 if index % 2 and x.shape[1] > config.window_size else 0
            x = _block(params, f"{name}.blocks.{index}", x, heads, size, shift)
        if stage + 1 < len(config.depths):
            quarters = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
            x = _layer_norm(params, f"{name}.downsample.norm", jnp.concatenate(quarters, axis=-1))
            x = linear(params, f"{name}.downsample.reduction", x)
    x = _layer_norm(params, f"{_AUDIO}.norm", x).mean(axis=(1, 2))
    return _projected(params, "audio_projection", x)


@functools.partial(jax.jit, static_argnames="config")
def embed_tokens(params: Params, ids: jax.Array, config: Config) -> jax.Array:
    """Token ids `[B, L]`, padded with `pad_token_id`, to unit vectors `[B, D]`."""
    real = ids != config.pad_token_id
    positions = jnp.where(real, jnp.cumsum(real, axis=1) + config.pad_token_id, config.pad_token_id)
    name, eps = f"{_TEXT}.embeddings", config.text_norm_eps
    x = params[f"{name}.word_embeddings.weight"][ids] + params[f"{name}.token_type_embeddings.weight"][0]
    x = _layer_norm(params, f"{name}.LayerNorm", x + params[f"{name}.position_embeddings.weight"][positions], eps)
    bias = jnp.where(real, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
    for index in range(config.text_layers):
        name = f"{_TEXT}.encoder.layer.{index}"
        attended = _attention(params, f"{name}.attention", x, config.text_heads, bias)
        x = _layer_norm(params, f"{name}.attention.output.LayerNorm", x + attended, eps)
        x = _layer_norm(params, f"{name}.output.LayerNorm", x + _feed_forward(params, name, x), eps)
    return _projected(params, "text_projection", jnp.tanh(linear(params, f"{_TEXT}.pooler.dense", x[:, 0])))


class Clap:
    """Unit vectors of patches of 10 s that start every second, as in fadtk; and of texts.

    Only whole patches are heard. A recording shorter than one is repeated as often as it fits, then filled with silence
    (`repeatpad`).
    """

    name = NAME
    sample_rate = 48_000  # Hz
    n_fft = 1024  # samples
    hop_length = 480  # samples
    patch_samples = 480_000
    patch_hop_samples = 48_000
    batch_size = 4  # patches

    def __init__(self, params: Params, config: Config, tokenizer: Tokenizer):
        self._params = {name: jnp.asarray(value) for name, value in params.items()}
        self._config, self._tokenizer = config, tokenizer
        tokenizer.enable_truncation(_MAX_TOKENS)
        tokenizer.enable_padding(pad_id=config.pad_token_id)

    def log_mel(self, audio: np.ndarray) -> np.ndarray:
        """Mono `[samples]` at 48 kHz to mel power in dB `[1 + samples // 480, n_mels]`, float32."""
        padded = np.pad(audio, self.n_fft // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop_length]
        power = np.abs(np.fft.rfft(frames * hann(self.n_fft))) ** 2
        config = self._config
        filters = mel_filters(self.sample_rate, self.n_fft, config.n_mels, config.fmin, config.fmax)
        return (10.0 * np.log10(np.maximum(power @ filters.T, 1e-10))).astype(np.float32)

    def embed(self, audio: np.ndarray, sample_rate: int) -> Embedding:
        """Embeds mono `[samples]`.

        Raises:
          UserError: there is nothing to hear.
        """
        audio = resample(audio, sample_rate, self.sample_rate)
        if not len(audio):
            raise UserError("no samples to embed with clap")
        if len(audio) < self.patch_samples:
            audio = np.tile(audio, self.patch_samples // len(audio))
            audio = np.pad(audio, (0, self.patch_samples - len(audio)))
        starts = range(0, len(audio) - self.patch_samples + 1, self.patch_hop_samples)
        log_mel = np.stack([self.log_mel(audio[start : start + self.patch_samples]) for start in starts])
        return Embedding(
            in_batches(lambda batch: embed_log_mel(self._params, batch, self._config), log_mel, self.batch_size)
        )

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors `[texts, D]`; what is beyond 77 tokens is not read, as in laion_clap."""
        ids = np.array([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))], np.int32)
        return np.asarray(embed_tokens(self._params, ids, self._config))


_TAKEN: dict[str, dict[str, Any]] = {  # with the published class's defaults
    "audio_config": {
        "depths": [2, 2, 6, 2],
        "num_attention_heads": [4, 8, 16, 32],
        "patch_embeds_hidden_size": 96,
        "window_size": 8,
        "spec_size": 256,
        "num_mel_bins": 64,
    },
    "text_config": {"num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-12, "pad_token_id": 1},
}
_FIXED: dict[str, dict[str, Any]] = {  # the one value that is implemented, which is the published class's default
    "audio_config": {
        "patch_size": 4,
        "patch_stride": [4, 4],
        "patch_embed_input_channels": 1,
        "enable_fusion": False,
        "enable_patch_layer_norm": True,
        "flatten_patch_embeds": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "mlp_ratio": 4.0,
        "projection_hidden_act": "relu",
        "qkv_bias": True,
    },
    "text_config": {"hidden_act": "gelu", "projection_hidden_act": "relu"},
}
_FIXED_FRONT_END = {
    "sampling_rate": 48_000,
    "fft_window_size": 1024,
    "hop_length": 480,
    "max_length_s": 10,
    "padding": "repeatpad",
}


def read_config(published: Mapping[str, Any], front_end: Mapping[str, Any]) -> Config:
    """From the `config.json` and the `preprocessor_config.json` of a transformers folder.

    Raises:
      UserError: a field has a value that is not implemented.
    """
    parts = {part: published.get(part) or {} for part in _TAKEN}
    fixed = [
        (parts[part].get(key, value), key, value) for part, fields in _FIXED.items() for key, value in fields.items()
    ]
    fixed += [(front_end.get(key, value), key, value) for key, value in _FIXED_FRONT_END.items()]
    for given, key, value in fixed:
        if given != value:
            raise UserError(f"another architecture: {key} is {given!r}, and only {value!r} is implemented")
    audio, text = (
        {key: parts[part].get(key, default) for key, default in fields.items()} for part, fields in _TAKEN.items()
    )
    return Config(
        depths=tuple(audio["depths"]),
        heads=tuple(audio["num_attention_heads"]),
        width=audio["patch_embeds_hidden_size"],
        window_size=audio["window_size"],
        spec_size=audio["spec_size"],
        n_mels=audio["num_mel_bins"],
        fmin=float(front_end.get("frequency_min", 0.0)),
        fmax=float(front_end.get("frequency_max", 14_000.0)),
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_norm_eps=text["layer_norm_eps"],
        pad_token_id=text["pad_token_id"],
    )


def load(weights: Path | None = None) -> Clap:
    """See `load_embedder`."""
    path = weights or installed_weights(NAME)
    read_weights(NAME, path, {})
    with safetensors.safe_open(path, "numpy") as file:
        about = file.metadata() or {}
    try:
        config, tokenizer = Config.from_json(about["config"]), Tokenizer.from_str(about["tokenizer"])
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: no config or tokenizer of clap in it; write it with launch.convert") from error
    return Clap(read_weights(NAME, path, config.shapes()), config, tokenizer)
