"""Stages `autoencoder` and `vocoder`: both learn from random crops of mix, context and stem."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from subtractive_jax import parts, records
from subtractive_jax.errors import UserError
from subtractive_jax.models import autoencoder
from subtractive_jax.models.network import Params
from subtractive_jax.representation.audio import read_audio
from subtractive_jax.representation.mel import Mel
from subtractive_jax.training.stage import Stage, example_keys, example_noise
from subtractive_jax.training.train_step import Batch, Figures
from subtractive_jax.vocoder import losses

_SIGNALS = ("mix", "context", "stem")
_DECODERS = 4  # threads; libsndfile releases the interpreter lock


class AudioSource:
    """Crops of the windows' audio at the representation's rate and the level models are trained at."""

    def __init__(self, split: records.Split, sample_rate: int, crop_samples: int) -> None:
        self.fingerprint = split.fingerprint
        self._split, self._sample_rate, self._crop_samples = split, sample_rate, crop_samples
        self._pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="flac")

    def __len__(self) -> int:
        return len(self._split)

    def _crop(self, window: dict[str, Any], draw: np.random.Generator) -> np.ndarray:
        signal = _SIGNALS[draw.integers(len(_SIGNALS))]
        audio, sample_rate = read_audio(window[signal])
        room = audio.shape[1] - self._crop_samples
        if sample_rate != self._sample_rate or room < 0:
            raise UserError(
                f"a window of {audio.shape[1]} samples at {sample_rate} Hz gives no crop of {self._crop_samples} "
                f"samples at {self._sample_rate} Hz; build the dataset with this config's representation"
            )
        start = draw.integers(room + 1)
        return window["gain"] * audio[0, start : start + self._crop_samples]

    def batch(self, examples: np.ndarray, draws: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """`audio` [B, crop_samples] float32."""
        return dict(audio=np.stack(list(self._pool.map(self._crop, self._split.read(examples), draws))))


def build(config: ml_collections.ConfigDict, data_dir: str) -> Stage:
    """The stage `config.stage`; a parent's part of that name is trained further.

    Raises:
      UserError: no dataset, or crops longer than its windows.
    """
    part = config.stage
    mel = Mel.from_config(config.representation)
    if config.crop_frames > mel.window_frames:
        raise UserError(
            f"config.crop_frames={config.crop_frames} is longer than "
            f"config.representation.window_frames={mel.window_frames}"
        )
    network = parts.network(part, config)

    def init_params(key: jax.Array, start: Params) -> Params:
        return start or {part: network.init(key)}

    def autoencoder_loss(params: Params, batch: Batch, step: jax.Array, train: bool) -> tuple[jax.Array, Figures]:
        # L1 plus KL, weighted as in diffusers' autoencoderkl training: mean over the image, sum over the latent.
        image = mel.encode(batch["audio"])
        moments = network.apply(params[part], image, method="encode_grey")
        latent = autoencoder.mode(moments)
        if train:
            keys = example_keys(config.seed, "posterior", step, batch["row"])
            latent = autoencoder.sample_posterior(moments, example_noise(keys, latent.shape[1:]))
        l1 = jnp.abs(network.apply(params[part], latent, method="decode_grey") - image).mean(axis=(1, 2, 3))
        kl = autoencoder.kl_divergence(moments)
        weight = jnp.ones_like(l1)
        return l1 + config.kl_weight * kl, dict(l1=(l1, weight), kl=(kl, weight))

    def vocoder_loss(params: Params, batch: Batch, step: jax.Array, train: bool) -> tuple[jax.Array, Figures]:
        log_mel = jnp.swapaxes(mel.log_magnitude(mel.encode(batch["audio"])), 1, 2)
        audio = network.apply(params[part], log_mel)
        return losses.spectral(mel, audio, batch["audio"])

    splits = (records.Split(data_dir, "windows", split, (*_SIGNALS, "gain")) for split in ("train", "validation"))
    sources = (AudioSource(split, mel.sample_rate, mel.samples(config.crop_frames)) for split in splits)
    return Stage(part, init_params, {"autoencoder": autoencoder_loss, "vocoder": vocoder_loss}[part], *sources)
