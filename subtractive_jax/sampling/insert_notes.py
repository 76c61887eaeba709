"""A song in notes without a part and an instruction -> the part, as notes, and the song with it as a MIDI file.

The counterpart of `insert`: the same sampler over windows of the song, which here begin at bar lines.
"""

import bisect
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from subtractive_jax.errors import UserError
from subtractive_jax.representation import notes as midi
from subtractive_jax.representation.notes import Score
from subtractive_jax.sampling import note_gates
from subtractive_jax.sampling.insert import Settings, sampler_for
from subtractive_jax.sampling.sampler import TIME_AXIS, Known
from subtractive_jax.sampling.windows import Windows

if TYPE_CHECKING:
    from subtractive_jax.model import Model


@dataclasses.dataclass(frozen=True)
class NoteInsertion:
    """A new part in its song.

    Attributes:
      score: the song without the part.
      stem: the part's name.
      notes: the part, `NOTE`, in the score's ticks.
      program: what plays it, General MIDI.
      info: settings, measures (`note_gates.figures`) and timings, as they go into `result.json`.
    """

    score: Score
    stem: str
    notes: np.ndarray
    program: int | None
    info: dict[str, Any]

    @property
    def _programs(self) -> dict[str, int]:
        return {} if self.program is None else {self.stem: self.program}

    @property
    def mix(self) -> bytes:
        """The song's MIDI file, all its tracks byte for byte, with a track more."""
        return midi.with_parts(self.score, {self.stem: self.notes}, self._programs)

    @property
    def alone(self) -> bytes:
        """A MIDI file of the part with the song's tempos and metres."""
        return midi.parts_alone(self.score, {self.stem: self.notes}, self._programs)


def insert_notes(
    model: "Model",
    score: Score,
    instruction: str,
    stem: str = "bass",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> NoteInsertion:
    """Puts a part into a song.

    Args:
      score: the song without the part: `notes.read_score("song.mid")`, and `without([stem])` if it has one.
      instruction: such as "Add a funk bass".
      stem: a name of `model.stems`.
      seed: the same seed gives the same part.
      progress: called with (calls of the denoiser done, calls in all).
      **settings: the fields of `Settings`.

    Raises:
      UserError: anything above that cannot be, or a model of audio.
    """
    return draw_notes(model, score, instruction, stem, [seed], Settings(**settings), progress=progress)[0]


def draw_notes(
    model: "Model",
    score: Score,
    instruction: str,
    stem: str,
    seeds: Sequence[int],
    settings: Settings,
    old: Score | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[NoteInsertion]:
    """As `insert_notes`, for one part a seed, drawn together.

    Args:
      old: the song with the part that it had before. Where `settings` name a part of the song, that stays outside of
        it, and the new part is drawn to continue it.
    """
    roll, began = model.roll, time.perf_counter()
    if settings.method == "sdedit":
        raise UserError('method "sdedit" is for models of audio')
    if settings.stem_gain_db:
        raise UserError("stem_gain_db is for models of audio: notes have velocities")
    sampler, _ = sampler_for(model, instruction, stem, settings)
    if stem in score.parts:
        raise UserError(f"the song has a part for {stem} already: take it out first (launch.sample: add --remove)")
    heard = [part for part in roll.parts if part in score.parts]
    if not heard:
        raise UserError(
            f"the song has no {', '.join(part for part in roll.parts if part != stem)} that the {stem} could play with"
        )
    place = _place(score, settings.start, settings.end)
    begin, windows = _windows(model, score, place)
    steps = windows.total
    missing = [part for part in roll.parts if part not in heard]
    metre = roll.metre(score, begin, steps)
    contexts = windows.split(roll.context(roll.encode(score, begin, steps), missing, metre), TIME_AXIS)

    known, kept = None, np.empty(0, midi.NOTE)
    if old is not None and stem in old.parts:
        kept = old.parts[stem]
        kept = kept[(kept["start"] < place[0]) | (kept["start"] >= place[1])]
        ticks = begin + (np.arange(steps) + 0.5) * score.ticks_per_beat / roll.steps_per_beat
        outside = (ticks < place[0]) | (ticks >= place[1])
        before = roll.encode(old, begin, steps)[..., roll.channels_of(stem)]
        shift, scale = np.float32(model.config.latent_shift), np.float32(model.config.latent_scale)
        known = Known((before - shift) * scale, outside) if len(kept) else None
    drawn = sampler.latents(contexts, seeds, known, progress, windows)
    sampling_seconds = time.perf_counter() - began

    insertions = []
    program = (old or score).programs.get(stem)
    for seed, line in zip(seeds, drawn, strict=True):
        drawn_roll = np.zeros((*line.shape[:2], roll.channels), np.float32)
        drawn_roll[..., roll.channels_of(stem)] = line
        new = roll.decode(drawn_roll, stem, score.ticks_per_beat, begin)
        new = new[(new["start"] >= place[0]) & (new["start"] < place[1])]
        new["end"] = np.minimum(new["end"], max(place[1], 1))
        part = np.concatenate([new, kept])
        part = part[np.lexsort((part["pitch"], part["start"]))]
        info = sampler.settings() | {
            "seed": seed,
            "stem": stem,
            "method": settings.method,
            "target": "notes",
            "parts_heard": heard,
            "start_seconds": float(score.seconds(place[0])),
            "end_seconds": float(score.seconds(place[1])),
            "windows": windows.count,
            "remarks": list(score.remarks),
            "figures": note_gates.figures(score, stem, new, place),
            "seconds": {"sampling": sampling_seconds / len(seeds)},
        }
        insertions.append(NoteInsertion(score, stem, part, program, info))
    return insertions


def _place(score: Score, start: float, end: float | None) -> tuple[int, int]:
    """Seconds to (first, last) ticks: where the part may begin its notes."""
    length = float(score.seconds(score.end))
    if not 0.0 <= start < (length if end is None else min(end, length)):
        raise UserError(
            f"start {start} and end {end}: 0 <= start < end must hold within the song's {length:.2f} seconds"
        )

    def tick(seconds: float) -> int:
        return bisect.bisect_left(range(score.end), seconds, key=lambda tick: float(score.seconds(tick)))

    first, last = tick(start), score.end if end is None else tick(end)
    if first >= last:
        raise UserError(f"start {start} and end {end}: not one tick lies between them")
    return first, last


def _windows(model: "Model", score: Score, place: tuple[int, int]) -> tuple[int, Windows]:
    """(the tick of the bar line at which the first window begins, windows over the place and half a window around)."""
    roll, beat = model.roll, score.ticks_per_beat
    bars = score.bars()
    margin = roll.ticks(roll.window_steps // 2, beat)
    begin = int(bars[np.searchsorted(bars, max(0, place[0] - margin), side="right") - 1])
    last = min(score.end, place[1] + margin)
    steps = max(1, -(-(last - begin) * roll.steps_per_beat // beat))
    lines = np.unique((bars[bars >= begin] - begin) * roll.steps_per_beat // beat)
    return begin, Windows.from_lines(lines, steps, roll.window_steps)
