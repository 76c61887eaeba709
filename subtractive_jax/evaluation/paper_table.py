"""Every row of the paper's table as audio: what the model writes, its baseline, and what frames them both.

Like is compared with like: the codec (autoencoder and vocoder) costs something of itself, music without the stem is
near the full mix already, and any stem of the right kind is nearer still. Each of these has its own row.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from subtractive_jax.errors import UserError
from subtractive_jax.evaluation import table
from subtractive_jax.evaluation.embedders import Embedder
from subtractive_jax.evaluation.table import Row
from subtractive_jax.model import Model
from subtractive_jax.models.autoencoder import mode
from subtractive_jax.records import Split
from subtractive_jax.representation.audio import read_audio, to_mono
from subtractive_jax.sampling.rhythm import onset_agreement, onset_strength, onsets


@dataclasses.dataclass(frozen=True)
class Window:
    """One example of the `windows` dataset at the training level: mono `[samples]` float32, mix = context + stem."""

    mix: np.ndarray
    context: np.ndarray
    stem: np.ndarray
    sample_rate: int  # Hz
    stem_name: str
    group_id: str
    instruction: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Sound:
    """A row's audio for one window; `stem` is what was put in, or None where nothing was."""

    mix: np.ndarray
    stem: np.ndarray | None = None


class UnavailableError(Exception):
    """Why a row cannot be filled."""


def read_windows(data_dir: str | Path, split: str, stem: str, num_windows: int) -> list[Window]:
    """`num_windows` windows that lack `stem`, evenly spaced over the split; all of them where there are fewer.

    Raises:
      UserError: the dataset is missing or damaged, or holds fewer than two such windows.
    """
    names = Split(data_dir, "windows", split, keys=("stem_name",))
    found = [index for index, example in enumerate(names) if example["stem_name"] == stem]
    if len(found) < 2:
        raise UserError(f'{data_dir}: the split "{split}" has {len(found)} windows without {stem}, a table needs two')
    chosen = np.linspace(0, len(found) - 1, min(num_windows, len(found))).round().astype(int)
    examples = Split(data_dir, "windows", split)
    windows = []
    for index in chosen:
        example = examples[found[index]]
        audio = {key: example["gain"] * to_mono(read_audio(example[key])[0]) for key in ("mix", "context", "stem")}
        windows.append(
            Window(
                **audio,
                sample_rate=int(example["sample_rate"]),
                stem_name=example["stem_name"],
                group_id=example["group_id"],
                instruction=example["instructions"][0],
                caption=example["caption"],
            )
        )
    return windows


def through_codec(model: Model, audio: Sequence[np.ndarray]) -> np.ndarray:
    """Windows of mono audio [windows, window_samples] encoded (the posterior's mode) and decoded: same shape."""
    return model.decode(np.asarray(mode(jnp.asarray(model.encode_audio(np.stack(audio))))))


def other_stems(windows: Sequence[Window]) -> list[np.ndarray]:
    """For each window the stem of the next one (cyclic) that is of another group."""
    stems = []
    for index, window in enumerate(windows):
        following = [*windows[index + 1 :], *windows[:index]]
        other = next((item for item in following if item.group_id != window.group_id), None)
        if other is None:
            raise UnavailableError("all windows are of one group: there is no other song's stem")
        stems.append(other.stem)
    return stems


def _has(model: Model, part: str) -> bool:
    try:
        model.params(part)
    except UserError:
        return False
    return True


def _sampled(model: Model, windows: Sequence[Window], texts: Sequence[str], **settings: Any) -> Iterator[Sound]:
    for index, (window, text) in enumerate(zip(windows, texts, strict=True)):
        result = model.insert(window.context, window.sample_rate, text, window.stem_name, seed=index, **settings)
        yield Sound(to_mono(result.mix), to_mono(result.stem))


def rows(
    models: Sequence[Model], windows: Sequence[Window], steps: int | None = None
) -> dict[str, Callable[[], Iterable[Sound]]]:
    """Row name -> its audio, window by window, or `UnavailableError`.

    The first model is the codec; each target and the baseline take the first model that has it. Window `i` is sampled
    with seed `i`, as a song of its own (the level rule is applied to the window's context).

    Args:
      steps: of the sampler; the models' own when None.
    """

    def codec(key: str) -> Iterable[Sound]:
        return map(Sound, through_codec(models[0], [getattr(window, key) for window in windows]))

    def another() -> Iterable[Sound]:
        return (Sound(window.context + stem, stem) for window, stem in zip(windows, other_stems(windows), strict=True))

    def sdedit() -> Iterable[Sound]:
        model = next((model for model in models if _has(model, "base_denoiser")), None)
        if model is None:
            raise UnavailableError("no model with a base denoiser was given")
        captions = [window.caption for window in windows]  # what the base was trained on
        return _sampled(model, windows, captions, method="sdedit", steps=steps)

    def ours(target: str) -> Iterable[Sound]:
        model = next((model for model in models if model.config.target == target and _has(model, "denoiser")), None)
        if model is None:
            raise UnavailableError(f"no model with target {target} was given")
        return _sampled(model, windows, [window.instruction for window in windows], steps=steps)

    return {
        "true mix through the codec": lambda: codec("mix"),
        "context alone": lambda: (Sound(window.context) for window in windows),
        "context alone through the codec": lambda: codec("context"),
        "context plus another song's stem": another,
        "SDEdit, base model": sdedit,
        "ours (mix target)": lambda: ours("mix"),
        "ours (stem target)": lambda: ours("stem"),
    }


def onset_f1(sounds: Sequence[Sound], windows: Sequence[Window]) -> np.ndarray:
    """F1 of the onsets of what was put in against the true stem's, +-70 ms, one value a window."""
    values = []
    for sound, window in zip(sounds, windows, strict=True):
        assert sound.stem is not None
        estimate, truth = (onsets(onset_strength(audio, window.sample_rate)) for audio in (sound.stem, window.stem))
        values.append(onset_agreement(estimate, truth)["f1"])
    return np.array(values)


def measure(
    embedder: Embedder,
    models: Sequence[Model],
    windows: Sequence[Window],
    steps: int | None = None,
    replicates: int = 100,
) -> list[Row]:
    """The table: every row against the true mixes of the same windows."""
    rate = windows[0].sample_rate
    names = [f"{index:05d}" for index in range(len(windows))]
    reference = table.embed_all(embedder, ((name, w.mix, rate) for name, w in zip(names, windows, strict=True)))
    measured = []
    for name, make in rows(models, windows, steps).items():
        try:
            sounds = list(tqdm(make(), desc=name, total=len(windows), leave=False))
        except UnavailableError as reason:
            measured.append(Row(name, 0, {}, str(reason)))
            continue
        candidate = table.embed_all(embedder, ((key, s.mix, rate) for key, s in zip(names, sounds, strict=True)))
        row = table.compare(name, reference, candidate, replicates)
        if sounds[0].stem is not None:
            row = dataclasses.replace(row, figures={**row.figures, "onset_f1": table.mean(onset_f1(sounds, windows))})
        measured.append(row)
    return measured
