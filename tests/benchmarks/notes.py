"""MIDI files to piano rolls of whole songs, against the loop that one would write with pretty_midi.

python -m tests.benchmarks.notes [--folder=FOLDER] [--rounds=3]

Both sides give the same array of onsets, sustain, velocities and offsets; it is compared where both pair notes alike.
Printed are songs a second of one core (CPU seconds of the fastest round) and their ratio.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pretty_midi
from absl import app, flags

from configs import midi_tiny
from subtractive_jax.representation import from_config
from subtractive_jax.representation.notes import DRUM_CLASSES, read_score, stem_of_program, stem_of_track
from subtractive_jax.representation.piano_roll import PianoRoll

_FOLDER = flags.DEFINE_string("folder", "data_pipeline/songs", "MIDI files, at any depth.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each is measured.", 1)


def ours(path: Path, roll: PianoRoll) -> np.ndarray:
    score = read_score(path)
    return roll.encode(score, 0, score.end * roll.steps_per_beat // score.ticks_per_beat + 1)


def plain(path: Path, roll: PianoRoll) -> np.ndarray:
    midi = pretty_midi.PrettyMIDI(str(path))
    ticks_per_step = midi.resolution / roll.steps_per_beat
    steps = int(midi.time_to_tick(midi.get_end_time()) / ticks_per_step) + 1
    array = np.zeros((roll.octaves, steps, len(roll.parts), 4, 12), np.float32)
    named = any(stem_of_track(instrument.name) for instrument in midi.instruments)
    for instrument in midi.instruments:
        by_name, by_program = stem_of_track(instrument.name), stem_of_program(instrument.program, instrument.is_drum)
        stem = by_name if named else by_program
        if stem not in roll.parts:
            continue
        part = array[:, :, roll.parts.index(stem)]
        for note in instrument.notes:
            exact = midi.time_to_tick(note.start) / ticks_per_step
            cell, end = int(exact + 0.5), int(midi.time_to_tick(note.end) / ticks_per_step + 0.5)
            place = DRUM_CLASSES[note.pitch] if stem == "drums" else note.pitch - roll.lowest_pitch
            row, pitch_class = divmod(int(np.clip(place, 0, 12 * roll.octaves - 1)), 12)
            if cell < steps and not part[row, cell, 0, pitch_class]:
                part[row, cell, :, pitch_class] = 1.0, 1.0, note.velocity / 127.0, exact - cell
            part[row, cell : cell + 1 if stem == "drums" else end, 1, pitch_class] = 1.0
    return array.reshape(roll.octaves, steps, roll.channels)


def measure(function: Callable[[Path], object], paths: list[Path]) -> float:
    """Songs a CPU second, of the fastest round."""
    seconds = []
    for _ in range(_ROUNDS.value):
        start = time.process_time()
        for path in paths:
            function(path)
        seconds.append(time.process_time() - start)
    return len(paths) / min(seconds)


def main(_: list[str]) -> None:
    roll = from_config(midi_tiny.get_config().representation)
    assert isinstance(roll, PianoRoll)
    paths = sorted(Path(_FOLDER.value).rglob("*.mid"))
    same, cells = 0, 0
    for path in paths:
        a, b = (array[..., :12].any(axis=(0, 2)) for array in (ours(path, roll), plain(path, roll)))
        length = min(len(a), len(b))
        same, cells = same + int(np.sum(a[:length] == b[:length])), cells + length
    print(f"{len(paths)} songs; {100 * same / cells:.2f} % of the steps agree on whether a drum begins")
    parse = measure(read_score, paths)
    rolls = measure(lambda path: ours(path, roll), paths)
    loop = measure(lambda path: plain(path, roll), paths)
    print(f"parse                     {parse:8.1f} songs a second of one core")
    print(f"parse and encode          {rolls:8.1f}")
    print(f"the loop with pretty_midi {loop:8.1f}: {rolls / loop:.1f} times slower")


if __name__ == "__main__":
    app.run(main)
