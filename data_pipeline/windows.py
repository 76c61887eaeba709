"""A song's stems to subtractive triples: (mix, mix without stems, those stems), window by window.

A song is heard once, from first to last sample, into a temporary file, while its levels are measured; then its windows
are read back. So memory does not grow with the song.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import IO

import numpy as np

from data_pipeline.bleed import Bleed
from data_pipeline.song import Recording
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.level import LoudnessMeter
from subtractive_jax.representation.notes import STEMS

_PEAK = 0.89  # of int16's full scale
_FULL_SCALE = 32768.0
_SEPARATION_FLOOR_DB = -40.0  # of a separated stem in a window, against the whole song


def stem_set(name: str) -> frozenset[str]:
    """The stems that are missing together: `bass+drums` is bass and drums."""
    return frozenset(name.split("+"))


def check_stem_set(name: str) -> None:
    """Raises UserError unless the name is of known stems, sorted and joined by "+"."""
    for stem in name.split("+"):
        if stem not in STEMS:
            raise unknown_name("stem", stem, STEMS)
    ordered = "+".join(sorted(stem_set(name)))
    if name != ordered:
        raise UserError(f'stems missing together are sorted: write "{ordered}" for "{name}"')


def _weights(stems: Sequence[str], names: Container[str]) -> np.ndarray:
    """`[stems]`: 1 for these names, 0 for all others."""
    return np.array([stem in names for stem in stems], np.float32)


def _sum(block: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`[samples]`: the rows of `[stems, samples]` whose weight is not 0, added up.

    A matrix product of so few rows takes fifty times as long.
    """
    return block[weights != 0.0].sum(axis=0)


def _power_db(power: float) -> float:
    return 10.0 * np.log10(power) if power > 0.0 else -np.inf


def _peak(signals: Iterable[np.ndarray]) -> float:
    return max(float(np.abs(signal).max(initial=0.0)) for signal in signals)


class HeardSong:
    """A song on disk and what was measured on the way.

    Attributes:
      stems: names of the rows.
      tags: the recording's.
      samples: length.
      sets: of `missing`, those whose stems the song has.
      separated: the stems are estimates.
      bleed_db: for separated material, by set of missing stems, how much of them is left in their context;
        NaN where they sound too little to tell.
      peak: of all stems, of the mix and of all contexts.
    """

    def __init__(self, file: IO[bytes], recording: Recording, sample_rate: int, missing: Iterable[str]):
        self._file, self.stems, self.tags, self.samples = file, recording.stems, recording.tags, 0
        self.sample_rate, self.separated = sample_rate, recording.separated
        taken = {name: _weights(self.stems, stem_set(name)) for name in missing if stem_set(name) <= set(self.stems)}
        self.sets = tuple(taken)
        self.peak = 0.0
        self._meter = LoudnessMeter(sample_rate, len(self.stems))
        self._gains: dict[tuple[bytes, float], float] = {}  # for a long song, as dear as all the rest of a window
        power = np.zeros((len(self.stems), len(self.stems)))
        bleed = {name: Bleed(sample_rate) for name in self.sets} if self.separated else {}
        for block in recording.blocks:
            file.write(np.ascontiguousarray(block.T).data)
            self.samples += block.shape[1]
            self._meter.add(block)
            wide = block.astype(np.float64)
            power += wide @ wide.T
            mix = block.sum(axis=0)
            sums = {name: _sum(block, weights) for name, weights in taken.items()}
            parts = (*block, *sums.values())
            self.peak = max(self.peak, _peak((mix, *parts, *(mix - part for part in parts))))
            for name, measure in bleed.items():
                measure.add(sums[name], mix - sums[name])
        if self.peak == 0.0:
            raise UserError("every stem is silent")
        self._power = power / self.samples
        self.bleed_db = {name: float(measure.db()) for name, measure in bleed.items()}

    def level_db(self, weights: np.ndarray) -> float:
        """RMS level of the whole song's rows added up with weights `[stems]`; -inf for silence."""
        return _power_db(float(weights @ self._power @ weights))

    def loudness_gain(self, weights: np.ndarray, loudness_lufs: float) -> float:
        """The level rule's gain for a context of the rows with weights `[stems]`."""
        key = (weights.tobytes(), loudness_lufs)
        if key not in self._gains:
            self._gains[key] = self._meter.gain(weights, loudness_lufs)
        return self._gains[key]

    def read(self, start: int, samples: int) -> np.ndarray:
        """float32 `[stems, samples]` from sample `start` on."""
        row_bytes = len(self.stems) * np.dtype(np.float32).itemsize
        self._file.seek(start * row_bytes)
        return np.frombuffer(self._file.read(samples * row_bytes), np.float32).reshape(samples, -1).T


@contextlib.contextmanager
def hear(recording: Recording, sample_rate: int, missing: Iterable[str]) -> Iterator[HeardSong]:
    """Reads the recording to its end; the song is there as long as the block runs.

    Args:
      missing: sets of missing stems that will be asked for, such as `drums` and `bass+drums`.

    Raises:
      UserError: every stem is silent; and what reading the recording raises.
    """
    with tempfile.TemporaryFile(prefix="subtractive-jax-") as file:
        yield HeardSong(file, recording, sample_rate, missing)


@dataclasses.dataclass(frozen=True)
class Window:
    """A window as it is played.

    Attributes:
      stems: float32 `[samples]` by name.
      weights: `[rows]` of the song: what of each row is heard in the window.
      rows: the row of each stem.
      semitones: how far it is transposed.
    """

    stems: dict[str, np.ndarray]
    weights: np.ndarray
    rows: dict[str, int]
    semitones: float = 0.0


Play = Callable[[HeardSong, int, int], Window]  # (song, first sample, samples)


def as_it_is(song: HeardSong, start: int, samples: int) -> Window:
    """The window without any change."""
    rows = {stem: row for row, stem in enumerate(song.stems)}
    stems = dict(zip(song.stems, song.read(start, samples), strict=True))
    return Window(stems, np.ones(len(rows), np.float32), rows)


@dataclasses.dataclass(frozen=True)
class Triple:
    """One window with stems missing: int16 `[samples]`, `mix == context + stem` exactly, levels as in the song."""

    stem_name: str
    start_seconds: float
    gain: float  # the factor that brings the song's context to the training level; not applied here
    mix: np.ndarray
    context: np.ndarray
    stem: np.ndarray
    semitones: float


def triples(
    song: HeardSong,
    missing: Sequence[str],
    window_samples: int,
    hop_samples: int,
    min_level_db: float,
    loudness_lufs: float,
    play: Play = as_it_is,
) -> Iterator[Triple]:
    """All triples of a song, window after window, and within a window in the order of `missing`.

    A triple is left out where the missing stems, or the context, are more than `-min_level_db` below their own level
    over the song; a separated stem also where it is 40 dB below the song.

    Args:
      missing: sets of stems to take out, of those that the song was heard for; what it lacks is passed over.
      window_samples: length of a window.
      hop_samples: distance between the starts of windows.
      min_level_db: `config.data.min_stem_level_db`, negative.
      loudness_lufs: `config.data.loudness_lufs`.

    Raises:
      UserError: the song is shorter than one window.
    """
    if song.samples < window_samples:
        raise UserError(f"shorter than one window ({song.samples / song.sample_rate:.2f} s)")
    # What a separator finds of an instrument that does not play is not silent, only soft.
    softest_db = song.level_db(np.ones(len(song.stems))) + _SEPARATION_FLOOR_DB if song.separated else -np.inf

    def is_heard(signal: np.ndarray, weights: np.ndarray, softest_db: float = -np.inf) -> bool:
        level_db = _power_db(np.mean(np.square(signal, dtype=np.float64)))
        return level_db > -np.inf and level_db >= max(song.level_db(weights) + min_level_db, softest_db)

    for start in range(0, song.samples - window_samples + 1, hop_samples):
        window = play(song, start, window_samples)
        block = np.stack(list(window.stems.values()))
        mixed = block.sum(axis=0)
        taken = {name: _weights(list(window.stems), stem_set(name)) for name in missing if name in song.sets}
        parts = {name: _sum(block, weights) for name, weights in taken.items()}
        # An augmented window may be louder than all of its song.
        loudest = max(
            song.peak, _peak((mixed, *(x for part in (*block, *parts.values()) for x in (part, mixed - part))))
        )
        scale = _PEAK * (_FULL_SCALE - 1.0) / loudest
        integers = np.round(block * np.float32(scale)).astype(np.int16)
        mix = integers.sum(axis=0, dtype=np.int16)
        for name, stem in parts.items():
            taken_rows = [window.rows[stem_name] for stem_name in stem_set(name)]
            stem_weights = np.zeros_like(window.weights)
            stem_weights[taken_rows] = window.weights[taken_rows]
            context_weights = window.weights - stem_weights
            context = _sum(block, 1.0 - taken[name])
            if not (is_heard(stem, stem_weights, softest_db) and is_heard(context, context_weights)):
                continue
            stem_integers = integers[taken[name] > 0].sum(axis=0, dtype=np.int16)
            gain = song.loudness_gain(context_weights, loudness_lufs) * _FULL_SCALE / scale
            yield Triple(
                name, start / song.sample_rate, gain, mix, mix - stem_integers, stem_integers, window.semitones
            )
