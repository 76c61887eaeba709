"""Every row of the paper's table as audio: what the model writes, its baseline, and what frames them both.

Like is compared with like: the codec (autoencoder and vocoder) costs something of itself, music without the stem is
near the full mix already, and any stem of the right kind is nearer still. Each of these has its own row.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from subtractive_jax.errors import UserError
from subtractive_jax.evaluation import distances, table
from subtractive_jax.evaluation.alignment import balanced_mix, chroma_agreement
from subtractive_jax.evaluation.distances import Estimate
from subtractive_jax.evaluation.embedders import Embedder, Embedding
from subtractive_jax.evaluation.table import Row
from subtractive_jax.model import Model
from subtractive_jax.models.autoencoder import mode
from subtractive_jax.records import Split
from subtractive_jax.representation.audio import read_audio, to_mono
from subtractive_jax.sampling.rhythm import (
    beat_agreement,
    beat_agreement_at_any_level,
    beats,
    onset_agreement,
    onset_strength,
    onsets,
)

DEFINITIONS = {
    "fd": "Fréchet distance to the true mixes, one embedding a window; audioldm_eval",
    "fad": "Fréchet distance to the true mixes, all patches; audioldm_eval",
    "fad_inf": "FAD extrapolated to unboundedly many patches; fadtk",
    "kad": "100 times the unbiased squared maximum mean discrepancy, bandwidth from the true mixes; kadtk",
    "kl_softmax": "KL(true mix || row), classes exclude each other; audioldm_eval",
    "kl_sigmoid": "the same with independent classes; audioldm_eval",
    "sub_fad": "FAD of untouched context plus stem; missing where the stem can only be estimated",
    "apa": "accompaniment prompt adherence of context and stem at equal loudness, 0 to 1",
    "onset_f1": "onsets of the stem against the true stem's, within 70 ms",
    "beat_f1": "beats of the stem against the true stem's, within 70 ms",
    "beat_level_f1": "the same, the best of the true beats, their off-beats, twice and half their tempo (mir_eval)",
    "chroma_agreement": "cosine of the chroma of stem and context, mean over frames in which both sound",
    "clap": "cosine of the mix's embedding and its caption's",
    "silent_stem": "share of results whose stem is silent against its context",
    "no_edit": "share of results in which nothing was put in: a silent stem, or a mix like its context",
}


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
    genre: str = ""  # the tag, where there is one


@dataclasses.dataclass(frozen=True)
class Sound:
    """A row's audio for one window.

    Attributes:
      mix: mono `[samples]`.
      stem: what was put in, or None where nothing was.
      is_sum: whether the mix is the untouched context plus the stem.
      flags: of the sampler's figures, None where nothing was sampled.
    """

    mix: np.ndarray
    stem: np.ndarray | None = None
    is_sum: bool = False
    flags: Sequence[str] | None = None


@runtime_checkable
class TextEmbedder(Protocol):
    """An embedder whose texts live in the space of its recordings: `embed_text` gives unit vectors `[texts, D]`."""

    def embed_text(self, texts: Sequence[str]) -> np.ndarray: ...


class UnavailableError(Exception):
    """Why a row cannot be filled."""


def read_windows(data_dir: str | Path, split: str, stem: str, num_windows: int) -> Iterator[Window]:
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
    return (_window(examples[found[index]]) for index in chosen)


def _window(example: Mapping[str, Any]) -> Window:
    audio = {key: example["gain"] * to_mono(read_audio(example[key])[0]) for key in ("mix", "context", "stem")}
    return Window(
        **audio,
        sample_rate=int(example["sample_rate"]),
        stem_name=example["stem_name"],
        group_id=example["group_id"],
        instruction=example["instructions"][0],
        caption=example["caption"],
        genre=str(json.loads(example["tags"]).get("genre") or ""),
    )


def through_codec(model: Model, audio: Sequence[np.ndarray]) -> np.ndarray:
    """Windows of mono audio [windows, window_samples] encoded (the posterior's mode) and decoded: same shape."""
    return model.decode(np.asarray(mode(jnp.asarray(model.encode_audio(np.stack(audio))))))


def through_vocoder(model: Model, audio: Sequence[np.ndarray]) -> np.ndarray:
    """Windows of mono audio [windows, window_samples] as mel images, and back: same shape."""
    return np.stack([model.vocode(image) for image in model.encode_image(np.stack(audio))])


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
        stem, info = to_mono(result.stem), result.info
        yield Sound(to_mono(result.mix), stem, not info["estimated"], info["figures"]["flags"])


def rows(
    models: Sequence[Model], windows: Sequence[Window], steps: int | None = None
) -> dict[str, Callable[[], Iterable[Sound]]]:
    """Row name -> its audio, window by window, or `UnavailableError`.

    The first model is the codec; each target and the baseline take the first model that has it. Window `i` is sampled
    with seed `i`, as a song of its own (the level rule is applied to the window's context).

    Args:
      steps: of the sampler; the models' own when None.
    """

    def vocoder(key: str) -> np.ndarray:
        return through_vocoder(models[0], [getattr(window, key) for window in windows])

    def codec(key: str) -> np.ndarray:
        return through_codec(models[0], [getattr(window, key) for window in windows])

    @functools.cache
    def codec_stems() -> np.ndarray:
        return codec("stem")

    def plus(stems: Iterable[np.ndarray]) -> Iterable[Sound]:
        return (Sound(window.context + stem, stem, is_sum=True) for window, stem in zip(windows, stems, strict=True))

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
        "true mix through the vocoder": lambda: map(Sound, vocoder("mix"), vocoder("stem")),
        "true mix through the codec": lambda: map(Sound, codec("mix"), codec_stems()),
        "context alone": lambda: (Sound(window.context) for window in windows),
        "context alone through the codec": lambda: map(Sound, codec("context")),
        "context plus another song's stem": lambda: plus(other_stems(windows)),
        "context plus the true stem through the codec": lambda: plus(codec_stems()),
        "SDEdit, base model": sdedit,
        "ours (mix target)": lambda: ours("mix"),
        "ours (stem target)": lambda: ours("stem"),
    }


def stem_figures(stems: Sequence[np.ndarray], windows: Sequence[Window]) -> dict[str, Estimate]:
    """How onsets and beats of stems agree with the true ones', and their chroma with the contexts'."""
    values: dict[str, list[float]] = {"onset_f1": [], "beat_f1": [], "beat_level_f1": [], "chroma_agreement": []}
    for stem, window in zip(stems, windows, strict=True):
        ours, truth = (onset_strength(audio, window.sample_rate) for audio in (stem, window.stem))
        values["onset_f1"].append(onset_agreement(onsets(ours), onsets(truth))["f1"])
        our_beats, true_beats = beats(ours), beats(truth)
        values["beat_f1"].append(beat_agreement(our_beats, true_beats))
        values["beat_level_f1"].append(beat_agreement_at_any_level(our_beats, true_beats))
        values["chroma_agreement"].append(chroma_agreement(stem, window.context, window.sample_rate))
    return {metric: table.mean(np.array(each)) for metric, each in values.items()}


class Measure:
    """What all rows of one table are measured with: embeddings of the true mixes, of pairs and of captions."""

    def __init__(self, embedder: Embedder, windows: Sequence[Window], replicates: int):
        self._embedder, self._windows, self._replicates = embedder, windows, replicates
        self._names = [f"{index:05d}" for index in range(len(windows))]
        self._reference = self._embedded([window.mix for window in windows])
        self._real = self._pairs([window.stem for window in windows])
        self._why_no_adherence = ""
        try:
            self._shuffled = self._pairs(other_stems(windows))
        except UnavailableError as reason:
            self._why_no_adherence = f"no APA: {reason}"
        self._captions = None
        if isinstance(embedder, TextEmbedder):
            self._captions = embedder.embed_text([window.caption for window in windows])

    def __call__(self, name: str, sounds: Sequence[Sound]) -> Row:
        """The row of these sounds, one a window."""
        candidate = self._embedded([sound.mix for sound in sounds])
        row = table.compare(name, self._reference, candidate, self._replicates)
        figures, notes = dict(row.figures), [row.note]
        if self._captions is not None:
            means = np.stack([candidate[key].patches.mean(axis=0) for key in self._names])
            cosines = np.sum(means * self._captions, axis=1) / np.linalg.norm(means, axis=1)
            figures["clap"] = table.mean(cosines)
        stems = [sound.stem for sound in sounds if sound.stem is not None]
        if stems:
            figures |= stem_figures(stems, self._windows)
            notes.append(self._why_no_adherence)
            if not self._why_no_adherence:
                figures["apa"] = self._adherence(self._pairs(stems))
            if sounds[0].is_sum:
                figures["sub_fad"] = figures["fad"]
        flags = [sound.flags for sound in sounds if sound.flags is not None]
        if flags:
            silent = np.array(["silent_stem" in raised for raised in flags], float)
            unchanged = np.array(["unchanged" in raised for raised in flags], float)
            figures |= {"silent_stem": table.mean(silent), "no_edit": table.mean(np.maximum(silent, unchanged))}
        return Row(name, row.count, figures, "; ".join(filter(None, notes)))

    def _embedded(self, audio: Iterable[np.ndarray]) -> dict[str, Embedding]:
        rate = self._windows[0].sample_rate
        return table.embed_all(
            self._embedder, ((key, each, rate) for key, each in zip(self._names, audio, strict=True))
        )

    def _pairs(self, stems: Sequence[np.ndarray]) -> list[Embedding]:
        """Embeddings of each context with a stem, mixed for prompt adherence."""
        windows = zip(self._windows, stems, strict=True)
        mixes = (balanced_mix(window.context, stem, window.sample_rate) for window, stem in windows)
        return list(self._embedded(mixes).values())

    def _adherence(self, candidate: Sequence[Embedding]) -> Estimate:
        sets = (candidate, self._real, self._shuffled)

        def apa(*indices: np.ndarray) -> float:
            return distances.prompt_adherence(*map(table.patches, sets, indices))

        estimate = distances.bootstrap(apa, [len(self._windows)] * 3, self._replicates, paired=True)
        return dataclasses.replace(estimate, low=max(estimate.low, 0.0), high=min(estimate.high, 1.0))


def measure(
    embedder: Embedder,
    models: Sequence[Model],
    windows: Sequence[Window],
    steps: int | None = None,
    replicates: int = 100,
) -> list[Row]:
    """The table: every row against the true mixes of the same windows."""
    row_of = Measure(embedder, windows, replicates)
    measured = []
    for name, make in rows(models, windows, steps).items():
        try:
            sounds = list(tqdm(make(), desc=name, total=len(windows), leave=False))
        except UnavailableError as reason:
            measured.append(Row(name, 0, {}, str(reason)))
            continue
        measured.append(row_of(name, sounds))
    return measured
