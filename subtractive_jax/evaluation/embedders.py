"""Networks that turn recordings into the embeddings and class logits that distances are measured on."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.audio import resample
from subtractive_jax.representation.mel import mel_filters
from subtractive_jax.representation.stft import hann

MUSICNN_FILE = Path(sys.prefix) / "share" / "subtractive_jax" / "musicnn.safetensors"  # launch.convert writes it


@dataclasses.dataclass(frozen=True)
class Embedding:
    """One recording: `patches` `[patches, dimensions]` float32 and `logits` `[classes]` float32."""

    patches: np.ndarray
    logits: np.ndarray


class Embedder(Protocol):
    """What `distances` are computed on. `embed` takes mono `[samples]` float32 at any rate in Hz."""

    name: str

    def embed(self, audio: np.ndarray, sample_rate: int) -> Embedding: ...


class MusiCNN:
    """musicnn (Pons and Serra 2019), trained on MagnaTagATune: 200-d penultimate layer and 50 tags.

    Patches of 187 frames (3 s) start every 62 frames (0.992 s); a recording shorter than one is repeated, as in its
    training ("repeat-pad"). `logits` are the mean over patches. The front end is librosa's of 2019 in float32: the
    published code rounds mel powers to float16, which overflows in loud music and is left out.
    """

    name = "musicnn"
    sample_rate = 16_000  # Hz
    n_fft = 512  # samples
    hop_length = 256  # samples
    n_mels = 96
    patch_frames = 187
    patch_hop_frames = 62
    batch_size = 16  # patches

    def __init__(self, params: dict[str, np.ndarray]):
        self._params = {name: jnp.asarray(value) for name, value in params.items()}

    def log_mel(self, audio: np.ndarray) -> np.ndarray:
        """Mono `[samples]` at 16 kHz to log10(1 + 10000 mel power) `[1 + samples // 256, 96]`."""
        padded = np.pad(audio, self.n_fft // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop_length]
        power = np.abs(np.fft.rfft(frames * hann(self.n_fft))) ** 2
        filters = mel_filters(self.sample_rate, self.n_fft, self.n_mels, 0.0, self.sample_rate / 2)
        return np.log10(1.0 + 10_000.0 * (power @ filters.T)).astype(np.float32)

    def embed(self, audio: np.ndarray, sample_rate: int) -> Embedding:
        """Embeds mono `[samples]`.

        Raises:
          UserError: there are fewer than 512 samples at 16 kHz.
        """
        audio = resample(audio, sample_rate, self.sample_rate)
        if len(audio) < self.n_fft:
            raise UserError(f"{len(audio)} samples at 16 kHz are too short for musicnn: give {self.n_fft} at least")
        log_mel = self.log_mel(audio)
        log_mel = np.resize(log_mel, (max(len(log_mel), self.patch_frames), self.n_mels))  # repeats what is too short
        windows = np.lib.stride_tricks.sliding_window_view(log_mel, self.patch_frames, axis=0)
        patches = windows[:: self.patch_hop_frames].swapaxes(1, 2)
        results = []
        for start in range(0, len(patches), self.batch_size):
            batch = patches[start : start + self.batch_size]
            full = np.zeros((self.batch_size, self.patch_frames, self.n_mels), np.float32)  # one shape, one compilation
            full[: len(batch)] = batch
            results.append([np.asarray(output)[: len(batch)] for output in musicnn(self._params, full)])
        embeddings, logits = (np.concatenate(outputs) for outputs in zip(*results, strict=True))
        return Embedding(embeddings, logits.mean(axis=0))


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


@jax.jit
def musicnn(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The network of the `musicnn` package, `models.build_musicnn`, at inference.

    Args:
      params: the checkpoint's arrays under their TensorFlow names.
      x: log-mel patches `[B, frames, 96]`.

    Returns:
      (penultimate layer `[B, 200]` after its batch norm, tag logits `[B, 50]`).
    """

    def norm(x: jax.Array, index: int) -> jax.Array:
        gamma, beta, mean, variance = (
            params[f"{_numbered('batch_normalization', index)}/{leaf}"]
            for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - mean) * (gamma * jax.lax.rsqrt(variance + 1e-3)) + beta

    def conv(x: jax.Array, index: int, padding: str | list[tuple[int, int]]) -> jax.Array:
        name = _numbered("conv2d", index)
        y = jax.lax.conv_general_dilated(
            x, params[f"{name}/kernel"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return norm(jax.nn.relu(y + params[f"{name}/bias"]), index + 1)

    def dense(x: jax.Array, index: int) -> jax.Array:
        name = _numbered("dense", index)
        return x @ params[f"{name}/kernel"] + params[f"{name}/bias"]

    same_time = [(3, 3), (0, 0)]
    x = norm(x[..., None], 0)
    timbral = [conv(x, index, same_time).max(axis=2) for index in (0, 1)]
    temporal = [conv(x, index, "SAME").max(axis=2) for index in (2, 3, 4)]
    front = jnp.concatenate(timbral + temporal, axis=2)  # [B, T, 561]
    layers = [front]
    for index in (5, 6, 7):
        features = conv(layers[-1][..., None], index, same_time)[:, :, 0]
        layers.append(features + layers[-1] if index > 5 else features)
    features = jnp.concatenate(layers, axis=2)
    pooled = jnp.stack([features.max(axis=1), features.mean(axis=1)], axis=2).reshape(len(x), -1)
    penultimate = norm(jax.nn.relu(dense(norm(pooled, 9), 0)), 10)
    return penultimate, dense(penultimate, 1)


def load_musicnn(path: Path = MUSICNN_FILE) -> MusiCNN:
    """Reads the converted weights.

    Raises:
      UserError: they are not there.
    """
    if not path.is_file():
        raise UserError(f"{path}: no musicnn weights; write them with `python -m launch.convert --from=musicnn`")
    return MusiCNN(safetensors.numpy.load_file(path))


EMBEDDERS: dict[str, Callable[[], Embedder]] = {"musicnn": load_musicnn}


@functools.cache
def load_embedder(name: str) -> Embedder:
    """The embedder of this name, with its weights.

    Raises:
      UserError: the name is unknown or the weights are not there.
    """
    if name not in EMBEDDERS:
        raise unknown_name("embedder", name, EMBEDDERS)
    return EMBEDDERS[name]()
