"""VGGish (Hershey et al. 2017), the network of Fréchet audio distance (Kilgour et al. 2019)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.errors import UserError
from subtractive_jax.evaluation.embedders.embedding import (
    Embedding,
    Params,
    convolution,
    in_batches,
    linear,
    read_weights,
)
from subtractive_jax.representation.audio import resample
from subtractive_jax.representation.stft import hann

NAME = "vggish"
_CONVOLUTIONS = {0: 64, 3: 128, 6: 256, 8: 256, 11: 512, 13: 512}  # place in `features`: channels
_POOLED = (0, 3, 8, 13)
_DENSE = {0: (4 * 6 * 512, 4096), 2: (4096, 4096), 4: (4096, 128)}  # place in `embeddings`: inputs and outputs


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, as in harritaylor/torchvggish."""
    result: dict[str, tuple[int, ...]] = {}
    inputs = 1
    for index, outputs in _CONVOLUTIONS.items():
        result |= {f"features.{index}.weight": (outputs, inputs, 3, 3), f"features.{index}.bias": (outputs,)}
        inputs = outputs
    for index, (inputs, outputs) in _DENSE.items():
        result |= {f"embeddings.{index}.weight": (outputs, inputs), f"embeddings.{index}.bias": (outputs,)}
    return result


@jax.jit
def vggish(params: Params, x: jax.Array) -> jax.Array:
    """Log-mel patches `[B, 96, 64]` to embeddings `[B, 128]`, as audioldm_eval: no last ReLU, PCA or quantisation."""
    x = x[..., None]
    for index in _CONVOLUTIONS:
        x = jax.nn.relu(convolution(params, f"features.{index}", x, padding=1))
        if index in _POOLED:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(len(x), -1)
    for index in _DENSE:
        x = linear(params, f"embeddings.{index}", jax.nn.relu(x) if index else x)
    return x


def mel_filters(n_fft: int, sample_rate: int, n_mels: int, fmin: float, fmax: float) -> np.ndarray:
    """Filters `[n_fft // 2 + 1, n_mels]`: HTK's mel scale, triangles in mel rather than in Hz, nothing at 0 Hz."""

    def mel(hz: np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(hz / 700.0)

    bins = mel(np.linspace(0.0, sample_rate / 2.0, n_fft // 2 + 1))[:, None]
    low, high = mel(np.array([fmin, fmax]))
    edges = np.linspace(low, high, n_mels + 2)
    width = edges[1] - edges[0]
    filters = np.maximum(0.0, 1.0 - np.abs(bins - edges[1:-1]) / width)
    filters[0] = 0.0
    return filters


class VGGish:
    """128-d embeddings of patches of 96 frames (0.96 s) without overlap; what is left at the end is not heard."""

    name = NAME
    sample_rate = 16_000  # Hz
    win_length = 400  # samples
    hop_length = 160  # samples
    n_fft = 512  # samples
    patch_frames = 96
    batch_size = 16  # patches

    def __init__(self, params: Params):
        self._params = {name: jnp.asarray(value) for name, value in params.items()}

    def log_mel(self, audio: np.ndarray) -> np.ndarray:
        """Mono `[samples]` at 16 kHz to log(mel magnitude + 0.01) `[1 + (samples - 400) // 160, 64]`, float32."""
        frames = np.lib.stride_tricks.sliding_window_view(audio, self.win_length)[:: self.hop_length]
        magnitude = np.abs(np.fft.rfft(frames * hann(self.win_length), self.n_fft))
        filters = mel_filters(self.n_fft, self.sample_rate, 64, 125.0, 7_500.0)
        return np.log(magnitude @ filters + 0.01).astype(np.float32)

    def embed(self, audio: np.ndarray, sample_rate: int) -> Embedding:
        """Embeds mono `[samples]`.

        Raises:
          UserError: it is shorter than a patch, 0.975 s.
        """
        audio = resample(audio, sample_rate, self.sample_rate)
        needed = self.win_length + (self.patch_frames - 1) * self.hop_length
        if len(audio) < needed:
            raise UserError(f"{len(audio)} samples at 16 kHz are too short for vggish: give {needed} at least")
        log_mel = self.log_mel(audio)
        count = len(log_mel) // self.patch_frames
        patches = log_mel[: count * self.patch_frames].reshape(count, self.patch_frames, -1)
        return Embedding(in_batches(lambda batch: vggish(self._params, batch), patches, self.batch_size))


def load(weights: Path | None = None) -> VGGish:
    """See `load_embedder`."""
    return VGGish(read_weights(NAME, weights, shapes()))
