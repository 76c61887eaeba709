"""The six cases of the paper's MIDI page, each as a table: the real part, another song's, one by rule, the model's."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from subtractive_jax.errors import UserError
from subtractive_jax.evaluation import rules, table
from subtractive_jax.evaluation.paper_table import UnavailableError
from subtractive_jax.evaluation.table import Row
from subtractive_jax.model import Model
from subtractive_jax.records import Split
from subtractive_jax.representation.notes import NOTE, Score, read_score, write
from subtractive_jax.representation.piano_roll import PianoRoll
from subtractive_jax.sampling import symbolic

FEWEST_NOTES = 4  # of a part in the datasets, too

METRICS = {  # column: heading
    "in_harmony": "in harmony",
    "chroma_agreement": "chroma",
    "real_chroma": "real chroma",
    "groove": "groove",
    "real_groove": "real groove",
    "density": "density",
    "register": "register",
    "duration": "duration",
    "empty": "empty",
    "novel_bars": "novel bars",
    "novel": "novel",
}
DEFINITIONS = {
    "in_harmony": "share of the part's time in pitch classes that the context plays in the same half bar; more than "
    "the real parts have is not better: a rule that takes its notes from there has nearly 1",
    "chroma_agreement": "cosine of part and context: how long each pitch class sounds in a half bar; mean of the half "
    "bars in which both sound",
    "real_chroma": "the same of the part and the real part of that place",
    "groove": "cosine of part and context: in how many bars there is an onset at each sixteenth of the bar",
    "real_groove": "the same of the part and the real part of that place; drums by class",
    "density": "|log2(notes of the part / notes of the real part)|",
    "register": "Wasserstein-1 distance of the pitches to the real part's, semitones; not of drums",
    "duration": "Wasserstein-1 distance of the durations to the real part's, quarter notes; not of drums",
    "empty": f"share of parts with fewer than {FEWEST_NOTES} notes; all other figures are of the rest",
    "novel_bars": "share of a part's bars that are no copy of a bar of the same stem in the train split: onsets at the "
    "same sixteenths, at the same pitches or all transposed alike (drums: of the same classes)",
    "novel": "share of parts that are not in this sense, as a whole, the part of a window of the train split",
    "minus": "differences of two rows are of the windows that both have",
    "count": "windows; intervals are of groups of songs drawn again, since windows of one group are not independent",
}
_TO_REAL = ("real_chroma", "real_groove", "density", "register", "duration")
REAL, OTHER, RULE, OURS = "real part", "another song's part", "rule", "ours"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is given, and what is to be written."""

    given: tuple[str, ...]
    stem: str

    def __str__(self) -> str:
        return f"{'+'.join(self.given)} -> {self.stem}"


PAGE = (  # the rows of the paper's page, in its order
    Case(("bass", "drums"), "guitar"),
    Case(("guitar",), "bass"),
    Case(("drums", "guitar"), "bass"),
    Case(("bass", "guitar"), "drums"),
    Case(("bass", "drums"), "guitar"),
    Case(("drums",), "guitar"),
)
CASES = tuple(dict.fromkeys(PAGE))  # bass+drums -> guitar is there twice, with two songs


@dataclasses.dataclass(frozen=True)
class Window:
    """One example of the `windows` dataset of a piano-roll representation.

    Attributes:
      context: what is given, and nothing else. Tick 0 is the window's bar line; notes from before it have lower ticks.
      stem: the notes of the real part that begin in the window, in the same ticks.
      end: the window's, in ticks.
      genre: the tag, where there is one.
    """

    context: Score
    stem: np.ndarray
    stem_name: str
    end: int
    group_id: str
    instruction: str
    genre: str = ""

    @property
    def bars(self) -> np.ndarray:
        """Ticks of the bar lines, and of the end."""
        return np.append(self.context.bars(self.end), self.end)

    @property
    def given(self) -> np.ndarray:
        """All notes of the context."""
        return np.concatenate(list(self.context.parts.values()))

    @property
    def harmony(self) -> np.ndarray:
        """The context's notes that have a pitch."""
        return np.concatenate([np.zeros(0, NOTE), *(self.context.parts[s] for s in self.context.parts if s != "drums")])


def read_windows(
    data_dir: str | Path, split: str, stem: str, num_windows: int, given: Sequence[str] = ()
) -> list[Window]:
    """`num_windows` windows that lack `stem`, evenly spaced over the split; all of them where there are fewer.

    Args:
      given: what is left of the context; windows in which one of them hardly plays are passed over. All if empty.

    Raises:
      UserError: the dataset is missing, damaged or of audio, or holds fewer than two such windows.
    """
    examples = Split(data_dir, "windows", split)
    roll = _representation(examples, data_dir)
    names = Split(data_dir, "windows", split, keys=("stem_name",))
    found = [index for index, example in enumerate(names) if example["stem_name"] == stem]
    if given:
        found = [index for index in found if _plays(_bar_line_first(examples[index]["mix"]), given)]
    if len(found) < 2:
        what = f" and with {', '.join(given)}" if given else ""
        raise UserError(
            f'{data_dir}: the split "{split}" has {len(found)} windows without {stem}{what}, a table needs two'
        )
    chosen = np.linspace(0, len(found) - 1, min(num_windows, len(found))).round().astype(int)
    return [_window(examples[found[index]], roll, given) for index in chosen]


def _representation(examples: Split, data_dir: str | Path) -> PianoRoll:
    representation = examples.metadata["representation"]
    if representation.get("name") != "piano_roll":
        raise UserError(f"{data_dir}: a dataset of audio; build one with configs/midi_tiny.py")
    return PianoRoll.from_config(representation)


def _bar_line_first(content: bytes) -> Score:
    """A file of the dataset, which has a beat before its bar line, with that bar line at tick 0."""
    score = read_score(content)
    lead_in = score.ticks_per_beat
    parts = {}
    for stem, notes in score.parts.items():
        parts[stem] = notes.copy()
        for key in ("start", "end"):
            parts[stem][key] -= lead_in
    tempos = {max(tick - lead_in, 0): tempo for tick, tempo in score.tempos}
    metres = {max(tick - lead_in, 0): (upper, lower) for tick, upper, lower in score.metres}
    return dataclasses.replace(
        score,
        parts=parts,
        tempos=tuple(tempos.items()),
        metres=tuple((tick, upper, lower) for tick, (upper, lower) in metres.items()),
        end=score.end - lead_in,
    )


def _begun(notes: np.ndarray, ticks_per_beat: int) -> np.ndarray:
    """The notes that begin at the window's first sixteenth, which may be a little early, or later."""
    begun = notes[notes["start"] >= -ticks_per_beat / symbolic.STEPS_PER_BEAT / 2.0]
    begun["start"] = np.maximum(begun["start"], 0)
    return begun[begun["end"] > begun["start"]]


def _plays(score: Score, stems: Sequence[str]) -> bool:
    empty = np.zeros(0, NOTE)
    return all(len(_begun(score.parts.get(stem, empty), score.ticks_per_beat)) >= FEWEST_NOTES for stem in stems)


def _only(score: Score, stems: Collection[str]) -> Score:
    """The score with these parts alone; its file begins at the bar line, too."""
    kept = {stem: score.parts[stem] for stem in score.parts if stem in stems}
    written = {stem: notes.copy() for stem, notes in kept.items()}
    for notes in written.values():
        notes["start"] = np.maximum(notes["start"], 0)
    written = {stem: notes[notes["end"] > notes["start"]] for stem, notes in written.items()}
    file = (score.ticks_per_beat, written, score.programs, score.tempos, score.metres, score.end)
    return dataclasses.replace(score, parts=kept, content=write(*file))


def _window(example: Mapping[str, Any], roll: PianoRoll, given: Sequence[str]) -> Window:
    score, stem = _bar_line_first(example["mix"]), example["stem_name"]
    return Window(
        context=_only(score, given or score.parts.keys() - {stem}),
        stem=_begun(score.parts[stem], score.ticks_per_beat),
        stem_name=stem,
        end=roll.ticks(roll.window_steps, score.ticks_per_beat),
        group_id=example["group_id"],
        instruction=example["instructions"][0],
        genre=str(json.loads(example["tags"]).get("genre") or ""),
    )


@dataclasses.dataclass(frozen=True)
class Known:
    """What the train split holds of a stem, as `symbolic.pattern`s: bars, and parts of whole windows."""

    bars: frozenset[bytes]
    parts: frozenset[bytes]


def read_known(data_dir: str | Path, stems: Collection[str]) -> dict[str, Known]:
    """Of each stem, all windows of the train split that lack it.

    Raises:
      UserError: the dataset is missing, damaged or of audio.
    """
    examples = Split(data_dir, "windows", "train", keys=("stem", "stem_name"))
    roll = _representation(examples, data_dir)
    bars: dict[str, set[bytes]] = {stem: set() for stem in stems}
    parts: dict[str, set[bytes]] = {stem: set() for stem in stems}
    for example in tqdm(examples, desc="train split", disable=None, leave=False):
        if (stem := example["stem_name"]) in stems:
            score = _bar_line_first(example["stem"])
            end = roll.ticks(roll.window_steps, score.ticks_per_beat)
            place = np.append(score.bars(end), end), score.ticks_per_beat, stem == "drums"
            bars[stem].update(symbolic.bar_patterns(score.parts[stem], *place))
            parts[stem].add(symbolic.pattern(score.parts[stem], *place))
    return {stem: Known(frozenset(bars[stem]), frozenset(parts[stem])) for stem in stems}


def figures(notes: np.ndarray, window: Window, known: Known) -> dict[str, float]:
    """The `METRICS` of one part; NaN where there is nothing to compare."""
    if len(notes) < FEWEST_NOTES:
        return {**dict.fromkeys(METRICS, np.nan), "empty": 1.0}
    bars, beat, real, drums = window.bars, window.context.ticks_per_beat, window.stem, window.stem_name == "drums"
    values = {
        "groove": symbolic.groove_agreement(
            *(symbolic.onset_profile(each, bars, beat) for each in (notes, window.given))
        ),
        "real_groove": symbolic.groove_agreement(
            *(symbolic.onset_profile(each, bars, beat, by_drum=drums) for each in (notes, real))
        ),
        "density": symbolic.density_distance(notes, real),
        "empty": 0.0,
        "novel_bars": float(
            np.mean([bar not in known.bars for bar in symbolic.bar_patterns(notes, bars, beat, drums)])
        ),
        "novel": float(symbolic.pattern(notes, bars, beat, drums) not in known.parts),
    }
    if not drums:
        edges = symbolic.half_bars(bars)
        values |= {
            "in_harmony": symbolic.in_harmony(notes, window.harmony, edges),
            "chroma_agreement": symbolic.chroma_agreement(notes, window.harmony, edges),
            "real_chroma": symbolic.chroma_agreement(notes, real, edges),
            "register": symbolic.register_distance(notes, real),
            "duration": symbolic.duration_distance(notes, real, beat),
        }
    return {metric: values.get(metric, np.nan) for metric in METRICS}


def by_rule(window: Window) -> np.ndarray:
    """The part that `rules` writes."""
    if window.stem_name == "drums":
        return rules.drums(window.context, window.end)
    write = rules.bass if window.stem_name == "bass" else rules.guitar
    return write(window.context, window.harmony, window.end)


def other_parts(windows: Sequence[Window]) -> list[np.ndarray]:
    """For each window the real part of the next one (cyclic) that is of another group, beat by beat.

    Raises:
      UnavailableError: all windows are of one group.
    """
    parts = []
    for index, window in enumerate(windows):
        following = [*windows[index + 1 :], *windows[:index]]
        other = next((item for item in following if item.group_id != window.group_id), None)
        if other is None:
            raise UnavailableError("all windows are of one group: there is no other song's part")
        parts.append(_at(other.stem, other.context.ticks_per_beat, window))
    return parts


def _at(notes: np.ndarray, ticks_per_beat: int, window: Window) -> np.ndarray:
    """The notes in ticks of the window, as far as it goes."""
    moved = notes.copy()
    for key in ("start", "end"):
        moved[key] = np.minimum(notes[key] * window.context.ticks_per_beat // ticks_per_beat, window.end)
    return moved[moved["start"] < moved["end"]]


def sampled(model: Model, windows: Sequence[Window], steps: int | None = None) -> Iterator[np.ndarray]:
    """What the model writes; window `i` with seed `i`."""
    for seed, window in enumerate(windows):
        yield model.insert_notes(window.context, window.instruction, window.stem_name, seed=seed, steps=steps).notes


def measure(windows: Sequence[Window], parts: Mapping[str, Sequence[np.ndarray]], known: Known) -> list[Row]:
    """The rows of one case, and how the last one differs from those between it and the real parts, window by window.

    Args:
      parts: row -> the part for each window; the real parts first.
    """
    groups = np.array([window.group_id for window in windows])
    values = {name: _values(notes, windows, known) for name, notes in parts.items()}
    real, *others, ours = values
    for metric in _TO_REAL:
        del values[real][metric]
    for other in others:
        values[f"{ours} minus {other}"] = {metric: values[ours][metric] - values[other][metric] for metric in METRICS}
    return [
        Row(
            name,
            len(windows),
            {
                metric: table.mean(each[~np.isnan(each)], groups=groups[~np.isnan(each)])
                for metric, each in own.items()
                if not np.isnan(each).all()
            },
        )
        for name, own in values.items()
    ]


def _values(parts: Sequence[np.ndarray], windows: Sequence[Window], known: Known) -> dict[str, np.ndarray]:
    each = [figures(notes, window, known) for notes, window in zip(parts, windows, strict=True)]
    return {metric: np.array([one[metric] for one in each]) for metric in METRICS}
