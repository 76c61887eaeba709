"""What a model makes of a few validation examples: sounds or notes, and pictures, at each evaluation.

Examples and seeds are the same every time, so that what differs is the model. Every process samples, since one that
waited for another might be taken for dead; only the first writes.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from subtractive_jax import parts, records
from subtractive_jax.diffusion import solvers
from subtractive_jax.model import Model
from subtractive_jax.models import autoencoder
from subtractive_jax.models.network import Params
from subtractive_jax.page import pictures
from subtractive_jax.representation.audio import read_audio, write_audio
from subtractive_jax.representation.notes import read_score, write
from subtractive_jax.sampling.sampler import SETTINGS, noise
from subtractive_jax.sampling.windows import Windows
from subtractive_jax.training import lora
from subtractive_jax.training.latent_stages import null_text_states, pad_texts
from subtractive_jax.training.metrics import Sound
from subtractive_jax.training.stages import PART_OF_STAGE
from subtractive_jax.weights import model_folder

DIRECTORY = "samples"
_DATASET = {"autoencoder": "windows", "vocoder": "windows", "base": "latents", "subtractive": "latents"}
_SPLIT = "validation"
_RULE_DB = 100.0  # louder than any music: the line between two pictures
_TICKS_PER_BEAT = 480
_DB = 20.0 / math.log(10.0)  # from natural logarithms of magnitudes

_Example = dict[str, Any]  # of a dataset, with the keys of `records.SCHEMAS`


class Preview(NamedTuple):
    """Pictures as PNG files and sounds, by name, as `metrics.Log` takes them."""

    images: dict[str, bytes]
    sounds: dict[str, Sound]


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What became of one example.

    Attributes:
      made_by: what it takes to make it again.
      sounds: audio [samples] at the song's own level, by name.
      images: mel images in dB [n_mels, frames], from top to bottom.
      midi: of a model of notes a MIDI file, in the place of the two.
    """

    made_by: dict[str, Any]
    sounds: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    images: Sequence[np.ndarray] = ()
    midi: bytes = b""


class _Model(Model):
    """A model whose parameters are on the devices only while it is used; it is compiled once for all of them."""

    @contextlib.contextmanager
    def holding(self, params: dict[str, Params]) -> Iterator[None]:
        self._params = jax.device_put(params, self._whole)
        try:
            yield
        finally:
            self._params = {}


def build(
    config: ml_collections.ConfigDict,
    data_dir: str,
    inherited: model_folder.ModelFiles,
    run_dir: str | os.PathLike[str],
) -> Callable[[int, Params], Preview]:
    """`preview(step, params)`: samples of `config.train.preview_examples` examples, in `run_dir/samples/<step>/` too.

    `params` are a state's, its EMA for instance, on any shardings. All processes must call it together. Where there are
    no examples, and for the text encoder, nothing is made; nor for a base denoiser of notes, which writes some part of
    a song and does not say which.

    Raises:
      UserError: no dataset, or a `config.sampling` that cannot be.
    """
    writes_notes = config.representation.name == "piano_roll"
    if config.stage not in _DATASET or not config.train.preview_examples or (writes_notes and config.stage == "base"):
        return _nothing
    split = records.Split(data_dir, _DATASET[config.stage], _SPLIT)
    count = min(config.train.preview_examples, len(split))
    if not count:
        if jax.process_index() == 0:
            print(f"{data_dir}: the {_SPLIT} split is empty, so there will be no previews", flush=True)
        return _nothing
    if _DATASET[config.stage] == "latents":
        _plan(config)  # what cannot be is said now, not hours later
    examples = split.read(np.arange(count) * len(split) // count)
    model, part = _Model(model_folder.ModelFiles(config, {}), windows_per_device=count), PART_OF_STAGE[config.stage]
    generated = functools.partial(_generated, metadata=split.metadata)
    makers: dict[str, Callable[[_Model, Sequence[_Example]], list[_Sample]]] = {
        "autoencoder": _reconstructed,
        "vocoder": _vocoded,
        "base": generated,
        "subtractive": functools.partial(_parts, metadata=split.metadata) if writes_notes else generated,
    }

    def preview(step: int, params: Params) -> Preview:
        params = multihost_utils.process_allgather(params, tiled=True)
        if config.train.lora.rank:
            params = lora.merge(params, config.train.lora)
        with model.holding(inherited.params | {part: params[part]}):
            samples = makers[config.stage](model, examples)
        if jax.process_index() > 0:
            return Preview({}, {})
        return _written(samples, Path(run_dir) / DIRECTORY / str(step), 0 if writes_notes else model.mel.sample_rate)

    return preview


def _nothing(step: int, params: Params) -> Preview:
    return Preview({}, {})


def _written(samples: Sequence[_Sample], folder: Path, sample_rate: int) -> Preview:
    """Writes a folder of `<number>_<name>.wav`, `<number>_mel.png` and `samples.json`, over one that is there.

    Of notes `<number>.mid` and `<number>_roll.png` are in the place of the first two.
    """
    images, sounds = {}, {}
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed later and came here again
    with model_folder.new_folder(folder) as new:
        for number, sample in enumerate(samples):
            kind = "roll" if sample.midi else "mel"
            images[f"preview_{number}/{kind}"] = picture = _picture(sample)
            (new / f"{number}_{kind}.png").write_bytes(picture)
            if sample.midi:
                (new / f"{number}.mid").write_bytes(sample.midi)
            for name, audio in sample.sounds.items():
                sounds[f"preview_{number}/{name}"] = Sound(audio, sample_rate)
                write_audio(new / f"{number}_{name}.wav", audio, sample_rate)
        made_by = json.dumps([sample.made_by for sample in samples], indent=2)
        (new / "samples.json").write_text(f"{made_by}\n")
    return Preview(images, sounds)


def _picture(sample: _Sample) -> bytes:
    """One PNG of mel images in dB, the first on top; colours span the same range in all. Or of a piano roll."""
    if sample.midi:
        return pictures.piano_roll(read_score(sample.midi), new=(sample.made_by["stem_name"],))
    images = sample.images
    rule = np.full((2, images[0].shape[1]), max(image.max() for image in images))
    rows = [row for image in reversed(images) for row in (rule, image)][1:]  # pictures begin with the lowest frequency
    (png,) = pictures.pngs([np.concatenate(rows)])
    return png


def _pictured(model: _Model, sounds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [pictures.mel_db(audio[None], model.mel.sample_rate) for audio in sounds.values()]


def _source(example: _Example) -> dict[str, Any]:
    return {name: example[name] for name in ("song_id", "stem_name")} | {
        name: float(example[name]) for name in ("start_seconds", "gain")
    }


def _windows(model: _Model, examples: Sequence[_Example]) -> np.ndarray:
    """The mixes [windows, window_samples] at the level that models are trained at."""
    audio = [read_audio(example["mix"])[0][0] * example["gain"] for example in examples]
    return np.stack(audio)[:, : model.mel.window_samples]


def _reconstructed(model: _Model, examples: Sequence[_Example]) -> list[_Sample]:
    """Mel images before and after the autoencoder."""
    audio = _windows(model, examples)
    moments = model.encode_audio(audio)
    pairs = zip(
        model.encode_image(audio), model.decode_image(np.asarray(autoencoder.mode(jnp.asarray(moments)))), strict=True
    )
    return [
        _Sample(_source(example), {}, [_DB * np.asarray(model.mel.log_magnitude(image)) for image in pair])
        for example, pair in zip(examples, pairs, strict=True)
    ]


def _vocoded(model: _Model, examples: Sequence[_Example]) -> list[_Sample]:
    """Audio, and what the vocoder makes of its mel image."""
    samples = []
    for example, original in zip(examples, _windows(model, examples), strict=True):
        (image,) = model.encode_image(original[None])
        sounds = dict(original=original / example["gain"], vocoded=model.vocode(image) / example["gain"])
        samples.append(_Sample(_source(example), sounds, _pictured(model, sounds)))
    return samples


def _plan(config: ml_collections.ConfigDict) -> solvers.Plan:
    return solvers.plan(config.schedule, config.sampling.solver, config.sampling.steps)


def _generated(model: _Model, examples: Sequence[_Example], metadata: dict[str, Any]) -> list[_Sample]:
    """Mixes for captions, or stems or mixes for contexts and instructions, beside what the song has there."""
    config = model.config
    subtractive = config.stage == "subtractive"
    target = config.target if subtractive else "mix"

    def decoded(name: str) -> np.ndarray:
        moments = np.stack([example[f"{name}_latent"] for example in examples])
        return model.decode(np.asarray(autoencoder.mode(jnp.asarray(moments, jnp.float32))))

    latents = [_denoised(model, example, seed, metadata) for seed, example in enumerate(examples)]
    audio = {"context": decoded("context")} if subtractive else {}
    audio[target] = model.decode(np.stack(latents))
    if target == "stem":
        audio["mix"] = audio["context"] + audio["stem"]
    audio["reference"] = decoded(target)

    settings = [name for name in SETTINGS if subtractive or name != "context_guidance"]
    samples = []
    for seed, example in enumerate(examples):
        sounds = {name: windows[seed] / example["gain"] for name, windows in audio.items()}
        text = dict(instruction=example["instructions"][0]) if subtractive else dict(caption=example["caption"])
        made_by = _source(example) | text | dict(seed=seed) | {name: config.sampling[name] for name in settings}
        samples.append(_Sample(made_by, sounds, _pictured(model, sounds)))
    return samples


def _parts(model: _Model, examples: Sequence[_Example], metadata: dict[str, Any]) -> list[_Sample]:
    """Contexts with the parts that are made for them, at 120 BPM."""
    roll = model.roll
    samples = []
    for seed, example in enumerate(examples):
        stem, whole = example["stem_name"], np.array(example["context_latent"][..., : roll.channels], np.float32)
        whole[..., roll.channels_of(stem)] = _denoised(model, example, seed, metadata)
        notes = {part: roll.decode(whole, part, _TICKS_PER_BEAT) for part in roll.parts}
        end = roll.ticks(roll.window_steps, _TICKS_PER_BEAT)
        played = {part: own for part, own in notes.items() if len(own)}
        content = write(_TICKS_PER_BEAT, played, {}, [(0, 500_000)], [(0, 4, 4)], end)
        about = dict(instruction=example["instructions"][0], seed=seed)
        made_by = _source(example) | about | {name: model.config.sampling[name] for name in SETTINGS}
        samples.append(_Sample(made_by, midi=content))
    return samples


def _denoised(model: _Model, example: _Example, seed: int, metadata: dict[str, Any]) -> np.ndarray:
    """The latent [F, T, C], unscaled, that `config.sampling` leads to from the noise of `seed`."""
    config, sampling, about = model.config, model.config.sampling, parts.latents(model.config)
    shift, scale, context_scale = (
        np.asarray(config[name], np.float32) for name in ("latent_shift", "latent_scale", "context_scale")
    )

    def output(x: np.ndarray, t: int) -> np.ndarray:
        if config.stage == "base":
            return model.denoise_base(x, t, states, mask, sampling.text_guidance, sampling.guidance_rescale)
        stem = model.stems.index(example["stem_name"])
        guidance = sampling.context_guidance, sampling.text_guidance, sampling.guidance_rescale
        return model.denoise(x, context, t, states, mask, stem, *guidance)

    context = np.asarray(example["context_latent"][None], np.float32)
    if config.autoencoder is not None:
        context = np.asarray(autoencoder.mode(jnp.asarray(context)))
    context = (context - shift) * context_scale
    text = example["caption_states"]
    if config.stage == "subtractive":
        text = example["instruction_states"][: example["instruction_lengths"][0]]
    states, mask = pad_texts([null_text_states(config, metadata), text], config.max_text_tokens)
    states = states.astype(np.float32)
    plan = _plan(config)
    frequencies, length, channels = about.shape
    state = solvers.start(plan, noise(seed, Windows(length, 1), frequencies, channels)[None])
    for call, t in enumerate(plan.timesteps):
        state = solvers.step(plan, call, state, output(np.asarray(state.x), t))
    return np.asarray(state.x)[0] / scale + shift
