"""Stages `autoencoder` and `vocoder`: both learn from random crops of mix, context and stem.

Both losses compare what was generated with what it should have been; with `config.adversarial.weight` above 0
discriminators compare them too.
"""

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
from subtractive_jax.models.network import Network, Params
from subtractive_jax.representation.audio import read_audio
from subtractive_jax.representation.mel import Mel
from subtractive_jax.training.stage import Stage, Task, example_keys, example_noise
from subtractive_jax.training.train_step import Batch, Figures
from subtractive_jax.vocoder import discriminators, losses

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


def _discriminators(config: ml_collections.ConfigDict) -> Network | None:
    """The stage's discriminators; None where `config.adversarial.weight` is 0."""
    adversarial = config.adversarial
    if adversarial.weight < 0.0 or adversarial.feature_weight < 0.0 or adversarial.channels < 1:
        raise UserError("config.adversarial: weight >= 0, feature_weight >= 0 and channels >= 1 must hold")
    if not adversarial.weight:
        return None
    dtype = jnp.dtype(config.compute_dtype)
    if config.stage == "vocoder":
        return discriminators.audio(adversarial.channels, dtype)
    shape, smallest = (config.representation.n_mels, config.crop_frames), discriminators.SMALLEST_IMAGE
    if min(shape) < smallest:
        raise UserError(
            f"config.adversarial judges images of at least {smallest} x {smallest}, not {shape[0]} x {shape[1]} "
            "(representation.n_mels, crop_frames)"
        )
    return discriminators.patch(adversarial.channels, dtype)


def frozen(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The parts of the parent that the stage's loss reads."""
    return ("autoencoder",) if config.stage == "vocoder" and config.through_autoencoder else ()


def task(config: ml_collections.ConfigDict) -> Task:
    """What the stage `config.stage` learns; a parent's part of that name is trained further.

    With `config.through_autoencoder` the vocoder learns from the images that the parent's autoencoder makes of the true
    ones, which are more like those that it is given of samples.

    With `config.adversarial.weight` above 0 discriminators are trained along, always from fresh parameters. The part's
    loss is then its own + weight (adversarial + feature_weight features). HiFi-GAN weighs mel, adversarial and features
    45 : 1 : 2, so 1 / 45 and 2.0 are its balance, apart from the STFT terms beside the mel term in our spectral loss.

    One loss and one gradient serve both players, so both move at once, each against the other as it was; HiFi-GAN moves
    its discriminators first, then the generator on the same batch. In validation the loss has no adversarial part, so
    that runs can be compared.

    Raises:
      UserError: crops longer than the windows or between latents, weights out of range, or accumulation in the stage
        `vocoder`.
    """
    part = config.stage
    mel = Mel.from_config(config.representation)
    if config.crop_frames > mel.window_frames:
        raise UserError(
            f"config.crop_frames={config.crop_frames} is longer than "
            f"config.representation.window_frames={mel.window_frames}"
        )
    if part == "vocoder" and config.train.accumulation_steps > 1:
        raise UserError(
            "stage vocoder measures each example against the power of the whole batch (losses.multi_resolution_stft): "
            "leave config.train.accumulation_steps at 1"
        )
    if part == "autoencoder" or frozen(config):
        stride = 2 ** (len(config.autoencoder.block_out_channels) - 1)
        if config.crop_frames % stride:
            raise UserError(
                f"config.crop_frames={config.crop_frames} is no multiple of {stride}, the autoencoder's stride"
            )
    network, adversary = parts.network(part, config), _discriminators(config)
    codec = parts.network("autoencoder", config) if frozen(config) else None

    def init_params(key: jax.Array, start: Params) -> Params:
        params = {part: start[part] if part in start else network.init(key)}
        if codec is not None:
            params["autoencoder"] = start["autoencoder"] if "autoencoder" in start else codec.init(key)
        if adversary is None:
            return params
        return {**params, "discriminators": adversary.init(jax.random.fold_in(key, 1))}

    def play(
        game: losses.Game, params: Params, own: jax.Array, generated: jax.Array, real: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The whole loss [B], given the part's `own`, and its terms [B]."""
        if adversary is None:
            return own, {}
        fooling, discriminator, features = losses.adversarial(
            game, adversary.apply, params["discriminators"], generated, real
        )
        generator = own + config.adversarial.weight * (fooling + config.adversarial.feature_weight * features)
        terms = dict(generator=generator, adversarial=fooling, features=features, discriminator=discriminator)
        return generator + discriminator if train else own, terms

    def autoencoder_loss(params: Params, batch: Batch, step: jax.Array, train: bool) -> tuple[jax.Array, Figures]:
        # L1 plus KL, weighted as in diffusers' autoencoderkl training: mean over the image, sum over the latent.
        image = mel.encode(batch["audio"])
        moments = network.apply(params[part], image, method="encode_grey")
        latent = autoencoder.mode(moments)
        if train:
            keys = example_keys(config.seed, "posterior", step, batch["row"])
            latent = autoencoder.sample_posterior(moments, example_noise(keys, latent.shape[1:]))
        decoded = network.apply(params[part], latent, method="decode_grey")
        l1 = jnp.abs(decoded - image).mean(axis=(1, 2, 3))
        kl = autoencoder.kl_divergence(moments)
        loss, terms = play(losses.HINGE, params, l1 + config.kl_weight * kl, decoded, image, train)
        return loss, _unweighted(dict(l1=l1, kl=kl) | terms)

    def vocoder_loss(params: Params, batch: Batch, step: jax.Array, train: bool) -> tuple[jax.Array, Figures]:
        image = mel.encode(batch["audio"])
        if codec is not None:
            latent = autoencoder.mode(codec.apply(params["autoencoder"], image, method="encode_grey"))
            image = codec.apply(params["autoencoder"], latent, method="decode_grey")
        audio = network.apply(params[part], jnp.swapaxes(mel.log_magnitude(image), 1, 2))
        spectral, figures = losses.spectral(mel, audio, batch["audio"])
        loss, terms = play(losses.LEAST_SQUARES, params, spectral, audio, batch["audio"], train)
        return loss, figures | _unweighted(terms)

    audio = jax.ShapeDtypeStruct((mel.samples(config.crop_frames),), np.float32)
    loss = {"autoencoder": autoencoder_loss, "vocoder": vocoder_loss}[part]
    return Task(part, init_params, loss, dict(audio=audio), frozen(config))


def _unweighted(terms: dict[str, jax.Array]) -> Figures:
    return {name: (term, jnp.ones_like(term)) for name, term in terms.items()}


def build(config: ml_collections.ConfigDict, data_dir: str) -> Stage:
    """The stage `config.stage` with its data.

    Raises:
      UserError: as `task`; or no dataset.
    """
    own = task(config)
    (samples,) = own.example["audio"].shape
    splits = (records.Split(data_dir, "windows", split, (*_SIGNALS, "gain")) for split in ("train", "validation"))
    return Stage(own, *(AudioSource(split, config.representation.sample_rate, samples) for split in splits))
