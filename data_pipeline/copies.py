"""Augmented copies of a song: its windows as another take, another balance or another key would have them."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from data_pipeline import augment
from data_pipeline.song import Recording
from data_pipeline.windows import HeardSong, Window
from subtractive_jax.errors import UserError

_OTHER_TAKE = "other take: "


def side_by_side(song: Recording, other_take: Recording, sample_rate: int) -> Recording:
    """Two takes as one recording, of which a `Copy` plays one row a stem.

    Raises:
      UserError: when its blocks are read: the takes cannot be mixed, see `augment.remixable`.
    """

    def blocks() -> Iterator[np.ndarray]:
        streams = song.blocks, other_take.blocks
        held = [np.zeros((len(take.stems), 0), np.float32) for take in (song, other_take)]
        samples = np.zeros(2, int)
        while True:
            held = [rest if rest.shape[1] else next(stream, rest) for rest, stream in zip(held, streams, strict=True)]
            lengths = [rest.shape[1] for rest in held]
            if not any(lengths):
                break
            count = min(length for length in lengths if length)
            samples += np.minimum(lengths, count)
            yield np.concatenate(
                [np.pad(rest[:, :count], ((0, 0), (0, count if not rest.shape[1] else 0))) for rest in held]
            )
            held = [rest[:, count:] for rest in held]
        if not augment.remixable(song.stems, samples[0], other_take.stems, samples[1], sample_rate):
            raise UserError("takes of different lengths, or with fewer than two stems in common")

    stems = (*song.stems, *(_OTHER_TAKE + stem for stem in other_take.stems))
    return dataclasses.replace(song, stems=stems, blocks=blocks())


@dataclasses.dataclass(frozen=True)
class Copy:
    """How the windows of one copy of a song are played: see `augment` for what is drawn from what.

    Attributes:
      song_id: the song's.
      number: 1 for the first copy.
      seed: of the build.
      pitch_semitones: largest transposition.
      gain_db: largest change of a stem's level.
    """

    song_id: str
    number: int
    seed: int
    pitch_semitones: float
    gain_db: float

    def __call__(self, song: HeardSong, start: int, samples: int) -> Window:
        drawn_by = (self.song_id, start / song.sample_rate, self.number, self.seed)
        own = {stem: row for row, stem in enumerate(song.stems) if not stem.startswith(_OTHER_TAKE)}
        others = {stem.removeprefix(_OTHER_TAKE): row for row, stem in enumerate(song.stems) if stem not in own}
        rows = augment.remix(own, others, *drawn_by) if others else own
        variation = augment.variation(rows, *drawn_by, self.pitch_semitones, self.gain_db)
        block = song.read(start, samples)
        stems = augment.vary({stem: block[row] for stem, row in rows.items()}, variation, song.sample_rate)
        weights = np.zeros(len(song.stems), np.float32)
        for stem, row in rows.items():
            weights[row] = 10.0 ** (variation.gains_db[stem] / 20.0)
        return Window(stems, weights, rows, variation.semitones)
