"""A song's notes to subtractive triples, window after window, and these to piano rolls.

A window begins at a bar line. As a MIDI file it has a beat before that, the lead-in: there lie onsets that are played a
little early, and the ends of notes that were begun before.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline import augment
from data_pipeline.grouping import PIECES
from data_pipeline.windows import stem_set
from subtractive_jax.errors import UserError
from subtractive_jax.representation import notes
from subtractive_jax.representation.notes import Score
from subtractive_jax.representation.piano_roll import PianoRoll

Tags = dict[str, Any]


def describe(part: np.ndarray, stem: str, seconds: float) -> Tags:
    """A part's tags from its notes: onsets a second, mean velocity, median pitch, drum pieces by count."""
    tags: Tags = {
        "onsets_per_s": round(len(np.unique(part["start"])) / max(seconds, 1e-6), 2),
        "vel_mean": round(float(part["velocity"].mean()), 1),
    }
    if stem != "drums":
        tags["pitch_median"] = round(float(np.median(part["pitch"])), 1)
    elif pieces := Counter(PIECES[pitch] for pitch in part["pitch"].tolist() if pitch in PIECES):
        tags["pieces"] = dict(pieces.most_common())
    return tags


def transposed(score: Score, semitones: int) -> Score:
    """All parts but drums moved, see `augment.transposed`."""
    parts = {}
    for stem, part in score.parts.items():
        parts[stem] = part.copy()
        if stem != "drums":
            parts[stem]["pitch"] = augment.transposed(part["pitch"], semitones)
    return dataclasses.replace(score, parts=parts)


@dataclasses.dataclass(frozen=True)
class Triple:
    """One window with stems missing, as MIDI files.

    Attributes:
      stem_name: the missing stems, joined by "+".
      start_seconds: of the window's bar line.
      mix, context, stem: the files, with the lead-in.
      tags: by stem, of what it plays in the window.
      semitones: how far it is transposed.
    """

    stem_name: str
    start_seconds: float
    mix: bytes
    context: bytes
    stem: bytes
    tags: dict[str, Tags]
    semitones: int


def starts(score: Score, roll: PianoRoll, hop_bars: int) -> np.ndarray:
    """The bar lines at which windows begin: every `hop_bars`-th from which a window ends within the song's last bar.

    Raises:
      UserError: the song is shorter than one window.
    """
    length = roll.ticks(roll.window_steps, score.ticks_per_beat)
    bars = score.bars(score.end + length)
    last = next(iter(bars[bars >= score.end]), score.end)
    found = bars[::hop_bars]
    found = found[found + length <= last]
    if not len(found):
        beats = score.end / score.ticks_per_beat
        raise UserError(f"shorter than one window ({beats:.1f} of {roll.window_steps / roll.steps_per_beat:.0f} beats)")
    return found


def triples(
    score: Score,
    missing: Sequence[str],
    roll: PianoRoll,
    hop_bars: int,
    min_onsets: int,
    transposition: Callable[[float], int] = lambda start_seconds: 0,
) -> Iterator[Triple]:
    """All triples of a song, window after window, and within a window in the order of `missing`.

    A triple is left out where a missing stem, or the context, has fewer than `min_onsets` onsets in the window, and
    where the song has had the same already.

    Args:
      missing: sets of stems to take out; what the song lacks is passed over.
      hop_bars: distance between the starts of windows.
      transposition: of the window that starts at a second, in semitones; 0 for none.

    Raises:
      UserError: the song is shorter than one window.
    """
    length = roll.ticks(roll.window_steps, score.ticks_per_beat)
    seen = set()
    for first in starts(score, roll, hop_bars).tolist():
        start_seconds = float(score.seconds(first))
        semitones = transposition(start_seconds)
        window = _window(transposed(score, semitones), first, first + length)
        seconds = float(score.seconds(first + length)) - start_seconds
        lead_in = score.ticks_per_beat
        heard = {stem: part[part["start"] >= lead_in] for stem, part in window.parts.items()}
        tags = {stem: describe(part, stem, seconds) for stem, part in heard.items() if len(part)}
        onsets = {stem: len(part) for stem, part in heard.items() if stem in roll.parts}
        mix = _file(window, list(window.parts))
        for name in missing:
            gone = stem_set(name)
            if not gone <= onsets.keys():
                continue
            kept = [count for stem, count in onsets.items() if stem not in gone]
            if min([sum(kept), *(onsets[stem] for stem in gone)]) < min_onsets:
                continue
            if (name, mix) in seen:
                continue
            seen.add((name, mix))
            context, stem = (
                _file(window, [own for own in window.parts if (own in gone) == taken]) for taken in (False, True)
            )
            yield Triple(name, start_seconds, mix, context, stem, tags, semitones)


def _window(score: Score, first: int, last: int) -> Score:
    """The stretch from a beat before `first` to `last`, with its times from there and the metre from `first` on."""
    begin = first - score.ticks_per_beat
    parts = {}
    for stem, part in score.parts.items():
        own = part[(part["end"] > begin) & (part["start"] < last)].copy()
        own["start"] = np.maximum(own["start"], begin) - begin
        own["end"] = np.minimum(own["end"], last) - begin
        parts[stem] = own
    return dataclasses.replace(
        score,
        parts=parts,
        tempos=tuple((tick - begin, tempo) for tick, tempo in _from(score.tempos, begin, last)),
        metres=((0, 1, 4), *((tick - begin, upper, lower) for tick, upper, lower in _from(score.metres, first, last))),
        end=last - begin,
    )


def _from(changes: Sequence[tuple[int, ...]], first: int, last: int) -> list[tuple[int, ...]]:
    """What is in force at `first`, as if it began there, and the changes after it, before `last`."""
    before = [rest for tick, *rest in changes if tick <= max(first, 0)][-1]
    return [(first, *before), *(change for change in changes if first < change[0] < last and change[0] > 0)]


def _file(window: Score, stems: Sequence[str]) -> bytes:
    parts = {stem: window.parts[stem] for stem in stems}
    return notes.write(window.ticks_per_beat, parts, window.programs, window.tempos, window.metres, window.end)


def latents(roll: PianoRoll, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An example of `windows` as `mix_latent`, `context_latent` and `stem_latent`, float16.

    Stems of the record's tags are the parts that the song has; the context says of all others that they are missing.
    """
    score = notes.read_score(example["mix"])
    first, steps = score.ticks_per_beat, roll.window_steps
    mix = roll.encode(score, first, steps)
    gone = stem_set(example["stem_name"])
    lacking = set(roll.parts) - json.loads(example["tags"])["stems"].keys()
    context = roll.context(mix, gone | lacking, roll.metre(score, first, steps))
    stem = mix - context[..., : roll.channels]
    return {
        name: array.astype(np.float16)
        for name, array in (("mix_latent", mix), ("context_latent", context), ("stem_latent", stem))
    }
