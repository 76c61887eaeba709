"""Cnn14 at 16 kHz of PANNs (Kong et al. 2020): the network of audioldm_eval's FD and KL, and of the paper's."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.evaluation.embedders.embedding import (
    Embedding,
    Params,
    batch_norm,
    convolution,
    linear,
    read_weights,
)
from subtractive_jax.representation.audio import resample
from subtractive_jax.representation.mel import mel_filters
from subtractive_jax.representation.stft import hann

NAME = "panns-cnn14-16k"
_CHANNELS = (64, 128, 256, 512, 1024, 2048)
_N_MELS = 64
_CLASSES = 527  # of AudioSet


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, as in qiuqiangkong/audioset_tagging_cnn, without its front end's."""

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{leaf}": (size,) for leaf in ("weight", "bias", "running_mean", "running_var")}

    result = norm("bn0", _N_MELS)
    inputs = 1
    for block, outputs in enumerate(_CHANNELS, start=1):
        for layer in (1, 2):
            result[f"conv_block{block}.conv{layer}.weight"] = (outputs, inputs, 3, 3)
            result |= norm(f"conv_block{block}.bn{layer}", outputs)
            inputs = outputs
    result |= {"fc1.weight": (inputs, inputs), "fc1.bias": (inputs,)}
    return result | {"fc_audioset.weight": (_CLASSES, inputs), "fc_audioset.bias": (_CLASSES,)}


@jax.jit
def cnn14(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-mel images `[B, frames, 64]` of 32 frames at least to (embeddings `[B, 2048]`, class logits `[B, 527]`)."""
    x = batch_norm(params, "bn0", x)[..., None]
    for block in range(1, len(_CHANNELS) + 1):
        for layer in (1, 2):
            x = convolution(params, f"conv_block{block}.conv{layer}", x, padding=1)
            x = jax.nn.relu(batch_norm(params, f"conv_block{block}.bn{layer}", x))
        if block < len(_CHANNELS):
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4.0
    x = x.mean(axis=2)
    embedding = jax.nn.relu(linear(params, "fc1", x.max(axis=1) + x.mean(axis=1)))
    return embedding, linear(params, "fc_audioset", embedding)


class Cnn14:
    """2048-d embeddings and AudioSet's 527 classes; a recording is one patch, as in audioldm_eval.

    One longer than a minute is cut into minutes, so that memory stays bounded; `logits` are then their mean. What is
    shorter than two seconds is filled with silence, and the mean of the samples is taken off, both as audioldm_eval
    does it.
    """

    name = NAME
    sample_rate = 16_000  # Hz
    n_fft = 512  # samples
    hop_length = 160  # samples
    longest = 60 * 16_000  # samples of a patch
    shortest = 2 * 16_000

    def __init__(self, params: Params):
        self._params = {name: jnp.asarray(value) for name, value in params.items()}

    def log_mel(self, audio: np.ndarray) -> np.ndarray:
        """Mono `[samples]` at 16 kHz to mel power in dB `[1 + samples // 160, 64]`, float32."""
        padded = np.pad(audio, self.n_fft // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop_length]
        power = np.abs(np.fft.rfft(frames * hann(self.n_fft))) ** 2
        filters = mel_filters(self.sample_rate, self.n_fft, _N_MELS, 50.0, 8_000.0)
        return (10.0 * np.log10(np.maximum(power @ filters.T, 1e-10))).astype(np.float32)

    def embed(self, audio: np.ndarray, sample_rate: int) -> Embedding:
        """Embeds mono `[samples]`."""
        audio = resample(audio, sample_rate, self.sample_rate)
        audio = audio - audio.mean()
        pieces = [audio[start : start + self.longest] for start in range(0, max(len(audio), 1), self.longest)]
        if len(pieces) > 1 and len(pieces[-1]) < self.shortest:
            pieces.pop()
        outputs = []
        for piece in pieces:
            piece = np.pad(piece, (0, max(0, self.shortest - len(piece))))
            outputs.append(cnn14(self._params, self.log_mel(piece)[None]))
        embeddings, logits = (
            np.concatenate([np.asarray(each) for each in kind]) for kind in zip(*outputs, strict=True)
        )
        return Embedding(embeddings, logits.mean(axis=0))


def load(weights: Path | None = None) -> Cnn14:
    """See `load_embedder`."""
    return Cnn14(read_weights(NAME, weights, shapes()))
