"""Piano rolls: notes on a grid of steps to `[octaves, steps, channels]`, and back to notes.

The roll of a song is `[pitch, step, parts x (onset, sustain, velocity, offset)]` with the pitches folded by octaves:
rows are octaves, and a channel is (part, field, pitch class). So a convolution sees all twelve classes of every part at
once, and the denoisers of the audio models, which take few rows and many channels, read it as it is.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.notes import DRUM_CLASSES, DRUM_KEYS, NOTE, STEMS, Score

FIELDS = ("onset", "sustain", "velocity", "offset")
_CLASSES = 12
_ONSET, _SUSTAIN, _VELOCITY, _OFFSET = range(len(FIELDS))


@dataclasses.dataclass(frozen=True)
class PianoRoll:
    """A piano-roll representation. Arrays are `[F, T, C]`: octaves, steps, channels `(part * 4 + field) * 12 + class`.

    | field | value |
    |---|---|
    | onset | 1 in the cell that is nearest to a note's onset |
    | sustain | 1 in every cell of the note, that of the onset too |
    | velocity | of 127, in the onset's cell |
    | offset | from the cell to the onset, in steps, [-0.5, 0.5), in the onset's cell: swing, tuplets, feel |

    Drums have their nine classes as pitch classes of the lowest row, and last one cell. A context `[F, T, C + P + 1]`
    has, after the channels, one plane for each of the P parts, which is 1 where the part is missing, and a plane of the
    metre: 1 at the first step of a bar, 0.5 at its other beats.

    Attributes:
      parts: stems that the roll holds.
      steps_per_beat: of a quarter note.
      window_steps: length of a window.
      lowest_pitch: the MIDI pitch of class 0 in the lowest row; pitches outside the rows are moved in by octaves.
      octaves: rows.
    """

    parts: tuple[str, ...]
    steps_per_beat: int
    window_steps: int
    lowest_pitch: int
    octaves: int
    name: str = "piano_roll"

    def __post_init__(self) -> None:
        if self.name != "piano_roll":
            raise unknown_name("representation.name", self.name, ("piano_roll",))
        for part in self.parts:
            if part not in STEMS:
                raise unknown_name("part in representation.parts", part, STEMS)
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise UserError("representation.parts: give each stem once, and at least one")
        if min(self.steps_per_beat, self.window_steps, self.octaves) < 1:
            raise UserError("representation: steps_per_beat, window_steps and octaves must be 1 or more")
        if not 0 <= self.lowest_pitch <= 128 - _CLASSES * self.octaves:
            raise UserError("representation: the octaves above lowest_pitch must be within MIDI's pitches, 0 to 127")

    @classmethod
    def from_config(cls, representation: Mapping[str, Any]) -> "PianoRoll":
        """From `config.representation`.

        Raises:
          UserError: the fields contradict each other or are unknown.
        """
        try:
            return cls(**{**representation, "parts": tuple(representation["parts"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"representation: {error}") from error

    @property
    def channels(self) -> int:
        return len(self.parts) * len(FIELDS) * _CLASSES

    @property
    def context_channels(self) -> int:
        return self.channels + len(self.parts) + 1

    def channels_of(self, part: str) -> slice:
        """Those of one part."""
        count = len(FIELDS) * _CLASSES
        return slice(self.parts.index(part) * count, (self.parts.index(part) + 1) * count)

    def ticks(self, steps: int, ticks_per_beat: int) -> int:
        """How many ticks these steps last, rounded."""
        return (2 * steps * ticks_per_beat + self.steps_per_beat) // (2 * self.steps_per_beat)

    def _cells(self, ticks: np.ndarray, ticks_per_beat: int) -> np.ndarray:
        """The step that is nearest to each tick; halves go up."""
        return (2 * ticks * self.steps_per_beat + ticks_per_beat) // (2 * ticks_per_beat)

    def _places(self, part: str, pitches: np.ndarray) -> np.ndarray:
        """Row * 12 + class of each pitch."""
        if part == "drums":
            return DRUM_CLASSES[pitches]
        place = pitches.astype(np.int64) - self.lowest_pitch
        top = _CLASSES * self.octaves
        return np.where((place >= 0) & (place < top), place, np.where(place < 0, 0, top - _CLASSES) + place % _CLASSES)

    def folded(self, score: Score) -> int:
        """How many notes are moved by octaves to be within the rows."""
        top = self.lowest_pitch + _CLASSES * self.octaves
        pitches = [score.parts[part]["pitch"] for part in self.parts if part in score.parts and part != "drums"]
        return sum(int(np.sum((pitch < self.lowest_pitch) | (pitch >= top))) for pitch in pitches)

    def encode(self, score: Score, first_tick: int, steps: int) -> np.ndarray:
        """The roll `[F, steps, C]` float32 of the stretch that begins at `first_tick`.

        Several notes of a pitch in one cell become one, from the first's onset to the last's end; a note ends where the
        next of its pitch begins.
        """
        roll = np.zeros((self.octaves, steps, len(self.parts), len(FIELDS), _CLASSES), np.float32)
        for index, part in enumerate(self.parts):
            if part in score.parts:
                self._draw(roll[:, :, index], part, score.parts[part], first_tick, score.ticks_per_beat)
        return roll.reshape(self.octaves, steps, self.channels)

    def _draw(self, roll: np.ndarray, part: str, notes: np.ndarray, first_tick: int, ticks_per_beat: int) -> None:
        """Draws a part's notes into `[F, T, fields, 12]`."""
        steps = roll.shape[1]
        start = notes["start"] - first_tick
        cell, end = self._cells(start, ticks_per_beat), self._cells(notes["end"] - first_tick, ticks_per_beat)
        end = cell + 1 if part == "drums" else np.maximum(end, cell + 1)
        near = np.flatnonzero((cell < steps) & (end > 0))
        place = self._places(part, notes["pitch"][near])
        order = np.lexsort((notes["start"][near], place))
        near, place = near[order], place[order]
        cell, end = cell[near], end[near]
        again = (place[1:] == place[:-1]) & (cell[1:] == cell[:-1])
        first, last = np.append(True, ~again)[: len(near)], np.append(~again, True)[: len(near)]
        near, place, cell, end = near[first], place[first], cell[first], end[last]
        following = np.append(np.where(place[1:] == place[:-1], cell[1:], steps), steps)[: len(near)]
        end = np.minimum(np.minimum(end, following), steps)
        row, pitch_class = np.divmod(place, _CLASSES)
        begun = cell >= 0
        onsets = row[begun], cell[begun], pitch_class[begun]
        roll[onsets[0], onsets[1], _ONSET, onsets[2]] = 1.0
        roll[onsets[0], onsets[1], _VELOCITY, onsets[2]] = notes["velocity"][near[begun]] / np.float32(127.0)
        exact = start[near[begun]] * (self.steps_per_beat / ticks_per_beat)
        roll[onsets[0], onsets[1], _OFFSET, onsets[2]] = exact - cell[begun]
        begin = np.maximum(cell, 0)
        lengths = np.maximum(end - begin, 0)
        note = np.repeat(np.arange(len(near)), lengths)
        sounding = np.arange(lengths.sum()) - (np.cumsum(lengths) - lengths)[note] + begin[note]
        roll[row[note], sounding, _SUSTAIN, pitch_class[note]] = 1.0

    def decode(self, roll: np.ndarray, part: str, ticks_per_beat: int, first_tick: int = 0) -> np.ndarray:
        """The part's notes in a roll `[F, T, C]` whose first step is at `first_tick`: `NOTE`, by start and pitch.

        A cell has an onset above 0.5; a note sounds while its sustain is above 0.5, and until the next of its pitch.
        """
        fields = roll.reshape(*roll.shape[:2], len(self.parts), len(FIELDS), _CLASSES)[:, :, self.parts.index(part)]
        if part == "drums":
            fields = fields[:1, :, :, : len(DRUM_KEYS)]
        steps = roll.shape[1]
        onset = fields[:, :, _ONSET] > 0.5
        stops = onset | (fields[:, :, _SUSTAIN] <= 0.5)
        cells = np.where(stops, np.arange(steps)[:, None], steps)
        at_or_after = np.minimum.accumulate(cells[:, ::-1], axis=1)[:, ::-1]
        after = np.concatenate([at_or_after[:, 1:], np.full_like(cells[:, :1], steps)], axis=1)
        row, cell, pitch_class = found = np.nonzero(onset)
        offset = np.clip(fields[row, cell, _OFFSET, pitch_class], -0.5, 0.5).astype(np.float64)
        ticks_per_step = ticks_per_beat / self.steps_per_beat
        notes = np.empty(len(row), NOTE)
        notes["start"] = np.maximum(first_tick + np.round((cell + offset) * ticks_per_step), 0)
        notes["end"] = np.maximum(first_tick + np.round(after[found] * ticks_per_step), notes["start"] + 1)
        is_drums = part == "drums"
        notes["pitch"] = (
            np.array(DRUM_KEYS)[pitch_class] if is_drums else self.lowest_pitch + _CLASSES * row + pitch_class
        )
        notes["velocity"] = np.clip(np.round(fields[row, cell, _VELOCITY, pitch_class] * 127.0), 1, 127)
        return notes[np.lexsort((notes["pitch"], notes["start"]))]

    def metre(self, score: Score, first_tick: int, steps: int) -> np.ndarray:
        """The plane of the metre `[steps]`, which goes on after the song's end."""
        last_tick = first_tick + self.ticks(steps, score.ticks_per_beat)
        ticks, is_bar = score.beats(last_tick)
        cells = self._cells(ticks - first_tick, score.ticks_per_beat)
        near = (cells >= 0) & (cells < steps)
        plane = np.zeros(steps, np.float32)
        np.maximum.at(plane, cells[near], np.where(is_bar[near], 1.0, 0.5).astype(np.float32))
        return plane

    def context(self, roll: np.ndarray, missing: Collection[str], metre: np.ndarray) -> np.ndarray:
        """What the denoiser is told: `[F, T, C + P + 1]` float32.

        Args:
          roll: `[F, T, C]`.
          missing: parts that are not given: the stem to be written, and parts that the song lacks.
          metre: `[T]`, see `metre`.
        """
        gone = np.array([part in missing for part in self.parts], np.float32)
        given = roll * np.repeat(1.0 - gone, len(FIELDS) * _CLASSES)
        planes = np.broadcast_to(np.append(gone, 0.0), (*roll.shape[:2], len(gone) + 1)).copy()
        planes[:, :, -1] = metre
        return np.concatenate([given, planes], axis=-1).astype(np.float32)
