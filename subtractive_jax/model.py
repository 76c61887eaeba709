"""A trained model, ready to sample: its parts compiled for windows of one length, in batches of one size."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from subtractive_jax import parts, representation
from subtractive_jax.diffusion import guidance
from subtractive_jax.errors import UserError
from subtractive_jax.representation.mel import Mel
from subtractive_jax.representation.piano_roll import PianoRoll
from subtractive_jax.sampling.insert import insert as _insert
from subtractive_jax.sampling.insert_notes import insert_notes as _insert_notes
from subtractive_jax.text import special_tokens, tokenize, visible
from subtractive_jax.training import partitioning
from subtractive_jax.vocoder import mel_matching
from subtractive_jax.vocoder.griffin_lim import GriffinLim
from subtractive_jax.weights import model_folder


class Model:
    """The parts of a model folder or run folder as functions of numpy arrays.

    Windows are computed `windows_per_device` at a time on each of this process's devices, so that every function is
    compiled for few shapes (powers of two up to that) and needs the same memory for every song.

    Attributes:
      name: what the model was loaded from.
      config: its resolved config.
    """

    def __init__(self, files: model_folder.ModelFiles, name: str = "", windows_per_device: int = 8):
        self.name = name
        self.config = files.config
        self._representation = representation.from_config(files.config.representation)
        vocoder = files.config.vocoder
        self._griffin_lim = None
        if vocoder is not None and vocoder.model_type == "griffin_lim":
            self._griffin_lim = GriffinLim(self.mel, vocoder.iterations, vocoder.momentum)
        self._mel_matching = files.config.get("mel_matching", 0)  # models of earlier versions have none
        if self._mel_matching:
            mel_matching.check(self.mel, self._mel_matching)
        self._tokenizer = files.tokenizer
        self._windows_per_device = windows_per_device
        mesh = partitioning.make_mesh(-1, devices=jax.local_devices())
        self._devices = mesh.size
        self._split, self._whole = partitioning.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        self._params = jax.device_put(files.params, self._whole)

    insert = _insert
    insert_notes = _insert_notes

    @property
    def writes_notes(self) -> bool:
        """Whether the model inserts into MIDI instead of audio."""
        return isinstance(self._representation, PianoRoll)

    @property
    def mel(self) -> Mel:
        """The representation of a model of audio.

        Raises:
          UserError: the model is one of notes.
        """
        if not isinstance(self._representation, Mel):
            raise UserError(f'model "{self.name}" reads and writes notes: give it MIDI, not audio')
        return self._representation

    @property
    def roll(self) -> PianoRoll:
        """The representation of a model of notes.

        Raises:
          UserError: the model is one of audio.
        """
        if not isinstance(self._representation, PianoRoll):
            raise UserError(f'model "{self.name}" writes audio, not notes: "midi_tiny" writes notes')
        return self._representation

    @property
    def stems(self) -> tuple[str, ...]:
        """The stems the model can put back."""
        return tuple(self.config.data.stems)

    def params(self, part: str) -> Any:
        """The parameters of one part.

        Raises:
          UserError: the model has no such part.
        """
        if part not in self._params:
            raise UserError(f'model "{self.name}" has no {part} (it has: {", ".join(sorted(self._params))})')
        return self._params[part]

    def encode_text(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts to states [B, max_text_tokens, D] float32, and which of them the denoiser may look at [B, ...] bool.

        Raises:
          UserError: a text is longer than `config.max_text_tokens`.
        """
        ids, mask = self._tokens(texts)
        more = (1 << (len(ids) - 1).bit_length()) - len(ids)  # few different batch sizes to compile
        padded = np.pad(ids, ((0, more), (0, 0))), np.pad(mask, ((0, more), (0, 0)))
        states = np.array(self._text_states(self.params("text_encoder"), *padded))[: len(ids)]
        return visible(states, mask, self.config.text_padding)

    def _tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._tokenizer is None:
            raise UserError(f'model "{self.name}" has no tokenizer, so it cannot read text')
        special = special_tokens(self.config.text_encoder)
        return tokenize(self._tokenizer, texts, self.config.max_text_tokens, special)

    def reads(self, text: str) -> bool:
        """Whether the text has at most `config.max_text_tokens` tokens."""
        try:
            self._tokens([text])
        except UserError:
            return False
        return True

    def encode_image(self, audio: np.ndarray) -> np.ndarray:
        """Windows [windows, window_samples] at the model's rate to mel images [windows, n_mels, frames, 1]."""
        return self._in_batches(self._images, None, audio)

    def encode_audio(self, audio: np.ndarray) -> np.ndarray:
        """Windows [windows, window_samples] at the model's rate to unscaled moments [windows, F, T, 2C]."""
        return self._in_batches(self._moments, self.params("autoencoder"), audio)

    def decode_image(self, latents: np.ndarray) -> np.ndarray:
        """Unscaled latents [windows, F, T, C] to mel images [windows, n_mels, frames, 1]."""
        return self._in_batches(self._decoded, self.params("autoencoder"), latents)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Unscaled latents [windows, F, T, C] to mono audio [windows, window_samples] at the model's rate."""
        images = self.decode_image(latents)
        if self._griffin_lim:
            return self._in_batches(self._griffin_lim_audio, None, images)
        halo = ((0, 0), (0, 0), (self.vocoder_halo,) * 2, (0, 0))
        return self._vocoded(np.pad(images, halo, constant_values=self.mel.silence))[:, : self.mel.window_samples]

    def vocode(self, image: np.ndarray) -> np.ndarray:
        """A mel image of any length [n_mels, frames, 1] to mono audio [mel.samples(frames)] at the model's rate.

        In chunks of a window's length, so that memory is bounded. Those of a vocoder with parameters overlap by
        more than it hears, so that no seam can be heard; for Griffin-Lim see `GriffinLim.song`.
        """
        if self._griffin_lim:
            return self._griffin_lim.song(image)
        frames, window, halo = image.shape[1], self.mel.window_frames, self.vocoder_halo
        chunks = math.ceil(frames / window)
        after = chunks * window - frames + halo
        padded = np.pad(image, ((0, 0), (halo, after), (0, 0)), constant_values=self.mel.silence)
        length = window + 2 * halo
        audio = self._vocoded(np.stack([padded[:, i * window : i * window + length] for i in range(chunks)]))
        return audio.reshape(-1)[: self.mel.samples(frames)]

    def denoise(
        self,
        x: np.ndarray,
        context: np.ndarray,
        timestep: int,
        text_states: np.ndarray,
        text_mask: np.ndarray,
        stem: int,
        context_guidance: float,
        text_guidance: float,
        guidance_rescale: float = 0.0,
    ) -> np.ndarray:
        """The subtractive denoiser's guided output for windows, in its prediction type: [windows, F, T, C].

        Where both guidances are 1 it is asked once instead of three times.

        Args:
          x: noisy scaled latents [windows, F, T, C].
          context: scaled latents of the context [windows, F, T, its channels].
          text_states: of the null text and of the instruction [2, L, D]; `text_mask` [2, L].
          stem: index in `stems`.
          guidance_rescale: see `guidance.rescaled`.
        """
        params, shared = self.params("denoiser"), (np.int32(timestep), text_states, text_mask, np.int32(stem))
        if context_guidance == text_guidance == 1.0:
            return self._in_batches(self._predicted, params, x, context, shared=shared)
        guided = (np.float32(context_guidance), np.float32(text_guidance), np.float32(guidance_rescale))
        return self._in_batches(self._denoised, params, x, context, shared=(*shared, *guided))

    def denoise_base(
        self,
        x: np.ndarray,
        timestep: int,
        text_states: np.ndarray,
        text_mask: np.ndarray,
        text_guidance: float,
        guidance_rescale: float = 0.0,
    ) -> np.ndarray:
        """The base denoiser's guided output for windows [windows, F, T, C]; arguments as in `denoise`."""
        guided = (np.float32(text_guidance), np.float32(guidance_rescale))
        shared = (np.int32(timestep), text_states, text_mask, *guided)
        return self._in_batches(self._denoised_base, self.params("base_denoiser"), x, shared=shared)

    def _in_batches(self, function: Callable, params: Any, *windows: np.ndarray, shared: tuple = ()) -> np.ndarray:
        """`function(params, *windows, *shared)` for any number of windows, in batches of few different sizes."""
        count = len(windows[0])
        needed = math.ceil(count / self._devices)
        size = self._devices * min(self._windows_per_device, 1 << (needed - 1).bit_length())
        outputs = []
        for start in range(0, count, size):
            batch = [array[start : start + size] for array in windows]
            widths = [[(0, size - len(array))] + [(0, 0)] * (array.ndim - 1) for array in batch]
            batch = [np.pad(array, width) for array, width in zip(batch, widths, strict=True)]
            outputs.append(function(params, *jax.device_put(batch, self._split), *shared))
        return np.concatenate([np.asarray(output) for output in outputs])[:count]

    def _jit(self, function: Callable, batched: int, shared: int = 0) -> Callable:
        """Compiles `function(params, *batched, *shared)` with the batches split over the devices.

        Each device computes its own windows: left to itself, XLA computes every FFT on all devices.
        """
        specs = (self._whole.spec, *(self._split.spec,) * batched, *(self._whole.spec,) * shared)
        # Unchecked: loops inside start from constants, which the check would have every function mark as varying.
        mesh, out_spec = self._split.mesh, self._split.spec
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=False))

    @functools.cached_property
    def _text_states(self) -> Callable:
        return jax.jit(parts.network("text_encoder", self.config).apply, in_shardings=(self._whole,) * 3)

    @functools.cached_property
    def _images(self) -> Callable:
        return self._jit(lambda _, audio: self.mel.encode(audio), batched=1)

    @functools.cached_property
    def _moments(self) -> Callable:
        network = parts.network("autoencoder", self.config)
        return self._jit(lambda p, audio: network.apply(p, self.mel.encode(audio), method="encode_grey"), batched=1)

    @functools.cached_property
    def _decoded(self) -> Callable:
        network = parts.network("autoencoder", self.config)
        return self._jit(functools.partial(network.apply, method="decode_grey"), batched=1)

    @functools.cached_property
    def _griffin_lim_audio(self) -> Callable:
        assert self._griffin_lim
        audio = self._griffin_lim.audio
        return self._jit(lambda _, images: jax.lax.map(audio, images), batched=1)  # one by one: spectra are large

    @functools.cached_property
    def vocoder_halo(self) -> int:
        """How many frames a vocoder with parameters is given on either side of those it renders."""
        return parts.vocoder_reach(self.config) + mel_matching.reach(self.mel, self._mel_matching)

    def _vocoded(self, images: np.ndarray) -> np.ndarray:
        """Images [chunks, n_mels, frames and a halo on either side, 1] to audio [chunks, frames * hop_length]."""
        return self._in_batches(self._vocoder_audio, self.params("vocoder"), images)

    @functools.cached_property
    def _vocoder_audio(self) -> Callable:
        network, halo = parts.network("vocoder", self.config), self.vocoder_halo * self.mel.hop_length

        def audio(params: Any, images: jax.Array) -> jax.Array:
            audio = network.apply(params, self.mel.log_magnitude(images).swapaxes(1, 2))
            return mel_matching.match_mel(self.mel, audio, images, self._mel_matching)[:, halo:-halo]

        return self._jit(audio, batched=1)

    @functools.cached_property
    def _denoised(self) -> Callable:
        network = parts.network("denoiser", self.config)

        def denoised(
            params: Any,
            x: jax.Array,
            context: jax.Array,
            timestep: jax.Array,
            text_states: jax.Array,
            text_mask: jax.Array,
            stem: jax.Array,
            context_guidance: jax.Array,
            text_guidance: jax.Array,
            guidance_rescale: jax.Array,
        ) -> jax.Array:
            windows = len(x)
            contexts = jnp.stack([jnp.zeros_like(context), context, context], axis=1)  # e(0,0), e(c,0), e(c,y)
            inputs = jnp.concatenate([jnp.repeat(x[:, None], 3, axis=1), contexts], axis=-1)
            outputs = network.apply(
                params,
                inputs.reshape(3 * windows, *inputs.shape[2:]),
                jnp.broadcast_to(timestep, 3 * windows),
                jnp.tile(text_states[jnp.array([0, 0, 1])], (windows, 1, 1)),
                jnp.tile(text_mask[jnp.array([0, 0, 1])], (windows, 1)),
                jnp.broadcast_to(stem, 3 * windows),
            ).reshape(windows, 3, *x.shape[1:])
            null, music, both = (outputs[:, branch] for branch in range(3))
            guided = guidance.context_and_text(null, music, both, context_guidance, text_guidance)
            return guidance.rescaled(guided, both, guidance_rescale)

        return self._jit(denoised, batched=2, shared=7)

    @functools.cached_property
    def _predicted(self) -> Callable:
        network = parts.network("denoiser", self.config)

        def predicted(
            params: Any,
            x: jax.Array,
            context: jax.Array,
            timestep: jax.Array,
            text_states: jax.Array,
            text_mask: jax.Array,
            stem: jax.Array,
        ) -> jax.Array:
            windows = len(x)
            return network.apply(
                params,
                jnp.concatenate([x, context], axis=-1),
                jnp.broadcast_to(timestep, windows),
                jnp.broadcast_to(text_states[1], (windows, *text_states.shape[1:])),
                jnp.broadcast_to(text_mask[1], (windows, *text_mask.shape[1:])),
                jnp.broadcast_to(stem, windows),
            )

        return self._jit(predicted, batched=2, shared=4)

    @functools.cached_property
    def _denoised_base(self) -> Callable:
        network = parts.network("base_denoiser", self.config)

        def denoised(
            params: Any,
            x: jax.Array,
            timestep: jax.Array,
            text_states: jax.Array,
            text_mask: jax.Array,
            text_guidance: jax.Array,
            guidance_rescale: jax.Array,
        ) -> jax.Array:
            windows = len(x)
            outputs = network.apply(
                params,
                jnp.repeat(x, 2, axis=0),
                jnp.broadcast_to(timestep, 2 * windows),
                jnp.tile(text_states, (windows, 1, 1)),
                jnp.tile(text_mask, (windows, 1)),
            ).reshape(windows, 2, *x.shape[1:])
            guided = guidance.text(outputs[:, 0], outputs[:, 1], text_guidance)
            return guidance.rescaled(guided, outputs[:, 1], guidance_rescale)

        return self._jit(denoised, batched=1, shared=5)


def load(name_or_path: str, windows_per_device: int = 8) -> Model:
    """Loads a model to sample from.

    Args:
      name_or_path: the name of a shipped model, a model folder, or a run folder (its newest checkpoint's EMA).
      windows_per_device: windows computed at once; fewer need less memory.

    Raises:
      UserError: there is no such model, or its files are incomplete or damaged.
    """
    return Model(model_folder.load(name_or_path), str(name_or_path), windows_per_device)
