"""Does the music do as it is told? Density, dynamics and genre are asked for, and looked for in what comes back.

All texts are tried on every window with the same seed, so that nothing but the text differs. `DEFINITIONS` says what
counts as obeyed, and goes into the report.
"""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

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

DENSITY, DYNAMICS = ("sparse", "busy"), ("soft", "loud")  # words of the training texts: for less, for more
FEWEST_EXAMPLES = 5  # windows of a genre that the classifier is fitted to
_LOWEST_DB = -60.0  # of a stem against its context: below, all is silence
_SPOKEN = {"latin": "Latin", "r&b": "R&B", "show": "show tune"}  # where texts call a genre otherwise than its tag

DEFINITIONS = {
    "density": '"Add busy ..." is obeyed when its stem has more onsets a second than that of "Add sparse ..." for the '
    "same window and seed",
    "dynamics": '"Add loud ..." is obeyed when its stem has a higher level (RMS in dB against the context, '
    f'{_LOWEST_DB:.0f} at least) than that of "Add soft ..." for the same window and seed',
    "genre": '"Add GENRE drums" is obeyed when the stem is not silent and a classifier of drum patterns, fitted to the '
    "train split's stems, takes it for that genre",
    "chance": "what texts without effect would reach: half of the pairs that are not equal; one of the genres",
    "unasked": "share of stems that are taken for the genre when another one was asked for",
    "ceiling": "share of the evaluation split's true stems of the genre that the classifier takes for it",
    "less, more": "means of what the two texts gave: onsets a second, or dB",
    "count": "windows, each tried with every text; intervals are of windows drawn again",
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One line of the report; see `DEFINITIONS`.

    Attributes:
      count: windows.
      unasked, ceiling: of genres.
      ceiling_count: true stems.
      less, more: of density and dynamics.
    """

    name: str
    count: int
    obeyed: Estimate
    chance: float
    unasked: Estimate | None = None
    ceiling: Estimate | None = None
    ceiling_count: int = 0
    less: Estimate | None = None
    more: Estimate | None = None


def measure(
    model: Model, windows: Sequence[Window], examples: Iterable[Window], steps: int | None = None
) -> tuple[list[Trial], str]:
    """The report, and why it has no genres if it has none.

    Args:
      windows: of one set of stems, kept out of training.
      examples: of the same stems from the train split; what drums of a genre are like.
      steps: of the sampler; the model's own when None.
    """
    classifier, reason = _classifier(windows[0].stem_name, examples)
    genres = classifier.genres if classifier else ()
    noun = " and ".join(windows[0].stem_name.split("+"))
    asked = [*DENSITY, *DYNAMICS, *(_SPOKEN.get(genre, genre) for genre in genres)]
    density, dynamics, heard = [], [], []
    for seed, window in enumerate(tqdm(windows, desc="windows", leave=False)):
        stems = []
        for word in asked:
            result = model.insert(
                window.context, window.sample_rate, f"Add {word} {noun}", window.stem_name, seed=seed, steps=steps
            )
            stems.append(to_mono(result.stem))
        sparse, busy, soft, loud = stems[:4]
        density.append([_onsets_a_second(stem, window.sample_rate) for stem in (sparse, busy)])
        dynamics.append([_level(stem, window) for stem in (soft, loud)])
        if classifier:
            heard.append([_genre(classifier, stem, window) for stem in stems[4:]])
    trials = [
        _pairs("density: busy over sparse", np.array(density)),
        _pairs("dynamics: loud over soft", np.array(dynamics)),
    ]
    if classifier:
        trials += _genres(classifier, np.array(heard), windows)
    return trials, reason


def _classifier(stem_name: str, examples: Iterable[Window]) -> tuple[GenreClassifier | None, str]:
    """The classifier, or why there is none."""
    if stem_name != "drums":
        return None, f"no genres: they are told from drum patterns, and the stem is {stem_name}"
    known = [
        (features(example.stem, example.mix, example.sample_rate), example.genre)
        for example in tqdm(examples, desc="patterns", leave=False)
        if example.genre
    ]
    counts = Counter(genre for _, genre in known)
    known = [(values, genre) for values, genre in known if counts[genre] >= FEWEST_EXAMPLES]
    if len({genre for _, genre in known}) < 2:
        return None, f"no genres: the train split has not two of them with {FEWEST_EXAMPLES} windows of drums each"
    return GenreClassifier.fitted(np.stack([values for values, _ in known]), [genre for _, genre in known]), ""


def _onsets_a_second(stem: np.ndarray, sample_rate: int) -> float:
    return len(onsets(onset_strength(stem, sample_rate))) * sample_rate / len(stem)


def _level(stem: np.ndarray, window: Window) -> float:
    return max(level_db(stem) - level_db(window.context), _LOWEST_DB)


def _genre(classifier: GenreClassifier, stem: np.ndarray, window: Window) -> str:
    if _level(stem, window) < SILENT_STEM_DB:
        return ""
    return classifier.predict(features(stem, window.context + stem, window.sample_rate)[None])[0]


def _pairs(name: str, values: np.ndarray) -> Trial:
    """Of `[windows, 2]`, less and more."""
    less, more = values.T
    return Trial(
        name,
        len(values),
        obeyed=table.mean((more > less).astype(float)),
        chance=float(np.mean(more != less)) / 2.0,
        less=table.mean(less),
        more=table.mean(more),
    )


def _genres(classifier: GenreClassifier, heard: np.ndarray, windows: Sequence[Window]) -> list[Trial]:
    """Of the genres heard `[windows, genres asked for]`: all together, then one by one."""
    genres = np.array(classifier.genres)
    tagged = [window for window in windows if window.genre in classifier.genres]
    truth = np.array([window.genre for window in tagged])
    taken = np.array([_genre(classifier, window.stem, window) for window in tagged])
    right = (taken == truth).astype(float)

    def ceiling(of: np.ndarray) -> dict[str, Any]:
        return {"ceiling": table.mean(right[of]), "ceiling_count": int(of.sum())} if of.any() else {}

    hits = (heard == genres).astype(float)
    chance = 1.0 / len(genres)
    trials = [Trial("genre: all", len(windows), table.mean(hits.mean(axis=1)), chance, **ceiling(truth != ""))]
    for index, genre in enumerate(genres):
        others = np.delete(heard == genre, index, axis=1).mean(axis=1)
        trials.append(
            Trial(
                f"genre: {genre}",
                len(windows),
                table.mean(hits[:, index]),
                chance,
                unasked=table.mean(others),
                **ceiling(truth == genre),
            )
        )
    return trials


_ESTIMATES = ("obeyed", "unasked", "ceiling", "less", "more")


def to_text(trials: Sequence[Trial], note: str) -> str:
    """The report for a terminal, with 95 % intervals."""
    lines = [["", "N", "obeyed", "chance", "unasked", "ceiling", "N", "less", "more"]]
    for trial in trials:
        obeyed, unasked, ceiling, less, more = (table.with_interval(getattr(trial, name)) for name in _ESTIMATES)
        counted = str(trial.ceiling_count) if trial.ceiling else "-"
        lines.append(
            [trial.name, str(trial.count), obeyed, f"{trial.chance:.2f}", unasked, ceiling, counted, less, more]
        )
    return "\n".join([table.aligned(lines), *([note] if note else [])])


def as_json(trials: Sequence[Trial], note: str) -> dict[str, Any]:
    """The report with its definitions."""
    return {"definitions": DEFINITIONS, "note": note, "trials": [dataclasses.asdict(trial) for trial in trials]}


def to_csv(trials: Sequence[Trial]) -> str:
    """The report as CSV: three columns an estimate."""
    ends = ("value", "low", "high")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = [f"{name}_{end}" for name in _ESTIMATES for end in ends]
    writer.writerow(["name", "count", "chance", "ceiling_count", *head])
    for trial in trials:
        estimates = (getattr(trial, name) for name in _ESTIMATES)
        cells = [getattr(estimate, end) if estimate else "" for estimate in estimates for end in ends]
        writer.writerow([trial.name, trial.count, trial.chance, trial.ceiling_count, *cells])
    return text.getvalue()
