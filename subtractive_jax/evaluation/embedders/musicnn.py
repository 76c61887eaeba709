"""musicnn (Pons and Serra 2019), whose trained weights come with its package."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.errors import UserError
from subtractive_jax.evaluation.embedders.embedding import Embedding, Params, in_batches, read_weights
from subtractive_jax.representation.audio import resample
from subtractive_jax.representation.mel import mel_filters
from subtractive_jax.representation.stft import hann

NAME = "musicnn"


class MusiCNN:
    """musicnn (Pons and Serra 2019), trained on MagnaTagATune: 200-d penultimate layer and 50 tags.

    Patches of 187 frames (3 s) start every 62 frames (0.992 s); a recording shorter than one is repeated, as in its
    training ("repeat-pad"). `logits` are the mean over patches. The front end is librosa's of 2019 in float32: the
    published code rounds mel powers to float16, which overflows in loud music and is left out.
    """

    name = NAME
    sample_rate = 16_000  # Hz
    n_fft = 512  # samples
    hop_length = 256  # samples
    n_mels = 96
    patch_frames = 187
    patch_hop_frames = 62
    batch_size = 8  # patches, those of 10.24 s

    def __init__(self, params: Params):
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
        embeddings, logits = in_batches(lambda batch: musicnn(self._params, batch), patches, self.batch_size)
        return Embedding(embeddings, logits.mean(axis=0))


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


@jax.jit
def musicnn(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
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


def load(weights: Path | None = None) -> MusiCNN:
    """See `load_embedder`."""
    return MusiCNN(read_weights(NAME, weights, {"dense_1/kernel": (200, 50)}))
