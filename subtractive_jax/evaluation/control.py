"""Does the music do as it is told? Density, dynamics and genre are asked for, and looked for in what comes back.

All texts are tried on every window with the same seed, so that nothing but the text differs. What counts as obeyed, a
`Listener`'s `definitions` say, which go into the report. That of audio is here, that of notes in `midi_control.py`.
"""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from subtractive_jax.evaluation import table
from subtractive_jax.evaluation.distances import Estimate
from subtractive_jax.evaluation.drum_genre import GenreClassifier, features
from subtractive_jax.evaluation.paper_table import Window
from subtractive_jax.model import Model
from subtractive_jax.representation.audio import to_mono
from subtractive_jax.sampling.gates import SILENT_STEM_DB, level_db
from subtractive_jax.sampling.rhythm import onset_strength, onsets

FEWEST_GROUPS = 5  # of a genre that the classifier is fitted to: what two songs share is no genre
_LOWEST_DB = -60.0  # of a stem against its context: below, all is silence
_SPOKEN = {"latin": "Latin", "r&b": "R&B", "show": "show tune"}  # where texts call a genre otherwise than its tag

DEFINITIONS = {
    "genre": '"Add GENRE ..." is obeyed when the stem is not silent and a classifier, fitted to the stems of the train '
    f"split, takes it for that genre; only genres with {FEWEST_GROUPS} groups or more in that split are told apart",
    "chance": "what texts without effect would reach: half of the pairs that are not equal; one of the genres",
    "unasked": "share of stems that are taken for the genre when another one was asked for",
    "ceiling": "share of the evaluation split's true stems of the genre that the classifier takes for it",
    "count": "windows, each tried with every text; intervals are of windows drawn again",
}


class Scale(NamedTuple):
    """Something that there can be less or more of.

    Attributes:
      name: such as "density".
      less, more: words of the training texts that ask for it.
      of: how much a stem has for its window, NaN where that cannot be told.
    """

    name: str
    less: str
    more: str
    of: Callable[[Any, Any], float]


class Listener(Protocol):
    """Asks a model for stems, and hears what they are like. A stem is whatever `insert` gives.

    Attributes:
      scales: what can be told of a stem.
      definitions: what counts as obeyed, beside `DEFINITIONS`.
      no_genres: why none are told apart; empty where they are.
    """

    scales: Sequence[Scale]
    definitions: Mapping[str, str]
    no_genres: str

    def insert(self, window: Any, text: str, seed: int) -> Any: ...

    def features(self, stem: Any, window: Any) -> np.ndarray | None:
        """What a genre is told from, `[D]`; None of a silent stem."""


class AudioListener:
    """Of `paper_table.Window`s; stems are mono `[samples]`.

    Args:
      stem_name: of all windows.
      steps: of the sampler; the model's own when None.
    """

    definitions: Mapping[str, str] = {
        "density": '"Add busy ..." is obeyed when its stem has more onsets a second than that of "Add sparse ..." for '
        "the same window and seed",
        "dynamics": '"Add loud ..." is obeyed when its stem has a higher level (RMS in dB against the context, '
        f'{_LOWEST_DB:.0f} at least) than that of "Add soft ..." for the same window and seed',
        "less, more": "means of what the two texts gave: onsets a second, or dB",
    }

    def __init__(self, model: Model, stem_name: str, steps: int | None = None):
        self._model, self._steps = model, steps
        self.scales: Sequence[Scale] = (
            Scale("density", "sparse", "busy", _onsets_a_second),
            Scale("dynamics", "soft", "loud", _level),
        )
        self.no_genres = (
            "" if stem_name == "drums" else f"they are told from drum patterns, and the stem is {stem_name}"
        )

    def insert(self, window: Window, text: str, seed: int) -> np.ndarray:
        result = self._model.insert(
            window.context, window.sample_rate, text, window.stem_name, seed=seed, steps=self._steps
        )
        return to_mono(result.stem)

    def features(self, stem: np.ndarray, window: Window) -> np.ndarray | None:
        if _level(stem, window) < SILENT_STEM_DB:
            return None
        return features(stem, window.context + stem, window.sample_rate)


def _onsets_a_second(stem: np.ndarray, window: Window) -> float:
    return len(onsets(onset_strength(stem, window.sample_rate))) * window.sample_rate / len(stem)


def _level(stem: np.ndarray, window: Window) -> float:
    return max(level_db(stem) - level_db(window.context), _LOWEST_DB)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One line of the report; see `DEFINITIONS`.

    Attributes:
      count: windows.
      unasked, ceiling: of genres; the latter's count is of true stems.
      less, more: of scales.
    """

    name: str
    count: int
    obeyed: Estimate
    chance: float
    unasked: Estimate | None = None
    ceiling: Estimate | None = None
    less: Estimate | None = None
    more: Estimate | None = None


def measure(listener: Listener, windows: Sequence[Any], examples: Iterable[Any]) -> tuple[list[Trial], str]:
    """The report, and why it has no genres if it has none.

    Args:
      windows: of one set of stems, kept out of training; `stem`, `stem_name` and `genre` are read here.
      examples: of the same stems from the train split; what a genre is like.
    """
    classifier, reason = _classifier(listener, examples)
    genres = classifier.genres if classifier else ()
    noun = " and ".join(windows[0].stem_name.split("+"))
    told: list[list[list[float]]] = [[] for _ in listener.scales]
    heard = []
    for seed, window in enumerate(tqdm(windows, desc="windows", leave=False)):

        def stem(word: str, window: Any = window, seed: int = seed) -> Any:
            return listener.insert(window, f"Add {word} {noun}", seed)

        for scale, values in zip(listener.scales, told, strict=True):
            values.append([scale.of(stem(word), window) for word in (scale.less, scale.more)])
        if classifier:
            asked = [stem(_SPOKEN.get(genre, genre)) for genre in genres]
            heard.append([_genre(listener, classifier, each, window) for each in asked])
    trials = [_pairs(scale, np.array(values)) for scale, values in zip(listener.scales, told, strict=True)]
    if classifier:
        taken = [_genre(listener, classifier, window.stem, window) for window in windows]
        trials += _genres(classifier, np.array(heard), np.array(taken), np.array([window.genre for window in windows]))
    return trials, reason


def _classifier(listener: Listener, examples: Iterable[Any]) -> tuple[GenreClassifier | None, str]:
    """The classifier, or why there is none."""
    if listener.no_genres:
        return None, f"no genres: {listener.no_genres}"
    known = []
    for example in tqdm(examples, desc="patterns", leave=False):
        if example.genre and (values := listener.features(example.stem, example)) is not None:
            known.append((values, example.genre, example.group_id))
    groups = Counter(genre for genre, _ in {(genre, group) for _, genre, group in known})
    known = [each for each in known if groups[each[1]] >= FEWEST_GROUPS]
    if len({genre for _, genre, _ in known}) < 2:
        return None, f"no genres: the train split has not two of them with {FEWEST_GROUPS} groups of the stem each"
    return GenreClassifier.fitted(np.stack([values for values, _, _ in known]), [genre for _, genre, _ in known]), ""


def _genre(listener: Listener, classifier: GenreClassifier, stem: Any, window: Any) -> str:
    values = listener.features(stem, window)
    return "" if values is None else classifier.predict(values[None])[0]


def _pairs(scale: Scale, values: np.ndarray) -> Trial:
    """Of `[windows, 2]`, less and more."""
    less, more = values.T
    told = ~np.isnan(values).any(axis=1)
    return Trial(
        f"{scale.name}: {scale.more} over {scale.less}",
        len(values),
        obeyed=table.mean((more > less).astype(float)),
        chance=float(np.mean(told & (more != less))) / 2.0,
        less=table.mean(less[told]) if told.any() else None,
        more=table.mean(more[told]) if told.any() else None,
    )


def _genres(classifier: GenreClassifier, heard: np.ndarray, taken: np.ndarray, truth: np.ndarray) -> list[Trial]:
    """All genres together, then one by one.

    Args:
      heard: the genres of `[windows, genres asked for]`.
      taken: those of the true stems `[windows]`.
      truth: their tags.
    """
    genres = np.array(classifier.genres)
    right = (taken == truth).astype(float)

    def ceiling(of: np.ndarray) -> Estimate | None:
        return table.mean(right[of]) if of.any() else None

    hits = (heard == genres).astype(float)
    chance = 1.0 / len(genres)
    known = np.isin(truth, genres)
    trials = [Trial("genre: all", len(heard), table.mean(hits.mean(axis=1)), chance, ceiling=ceiling(known))]
    for index, genre in enumerate(genres):
        trials.append(
            Trial(
                f"genre: {genre}",
                len(heard),
                table.mean(hits[:, index]),
                chance,
                unasked=table.mean(np.delete(heard == genre, index, axis=1).mean(axis=1)),
                ceiling=ceiling(truth == genre),
            )
        )
    return trials


_ESTIMATES = ("obeyed", "unasked", "ceiling", "less", "more")


def to_text(trials: Sequence[Trial], note: str) -> str:
    """The report for a terminal, with 95 % intervals."""
    lines = [["", "N", "obeyed", "chance", "unasked", "ceiling", "N", "less", "more"]]
    for trial in trials:
        obeyed, unasked, ceiling, less, more = (table.with_interval(getattr(trial, name)) for name in _ESTIMATES)
        counted = str(trial.ceiling.count) if trial.ceiling else "-"
        lines.append(
            [trial.name, str(trial.count), obeyed, f"{trial.chance:.2f}", unasked, ceiling, counted, less, more]
        )
    return "\n".join([table.aligned(lines), *([note] if note else [])])


def as_json(listener: Listener, trials: Sequence[Trial], note: str) -> dict[str, Any]:
    """The report with its definitions."""
    definitions = {**listener.definitions, **DEFINITIONS}
    return {"definitions": definitions, "note": note, "trials": [dataclasses.asdict(trial) for trial in trials]}


def to_csv(trials: Sequence[Trial]) -> str:
    """The report as CSV: four columns an estimate."""
    ends = ("value", "low", "high", "count")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = [f"{name}_{end}" for name in _ESTIMATES for end in ends]
    writer.writerow(["name", "count", "chance", *head])
    for trial in trials:
        estimates = (getattr(trial, name) for name in _ESTIMATES)
        cells = [getattr(estimate, end) if estimate else "" for estimate in estimates for end in ends]
        writer.writerow([trial.name, trial.count, trial.chance, *cells])
    return text.getvalue()
