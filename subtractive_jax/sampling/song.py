"""Songs as streams: block by block from memory or from files, so that an hour of music needs little memory."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from subtractive_jax.errors import UserError
from subtractive_jax.representation.audio import AudioFile, resampled

BLOCK_SAMPLES = 1 << 18


class Song(Protocol):
    """Audio that can be read from its beginning, any number of times.

    Attributes:
      sample_rate: in Hz.
      channels: number of channels.
    """

    @property
    def sample_rate(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def blocks(self) -> Iterator[np.ndarray]:
        """[channels, BLOCK_SAMPLES] float32 in [-1, 1]; the last block may be shorter."""
        ...


@dataclasses.dataclass(frozen=True)
class Recording:
    """A song in memory: [channels, samples] float32."""

    audio: np.ndarray
    sample_rate: int

    @classmethod
    def checked(cls, audio: np.ndarray, sample_rate: int) -> "Recording":
        """From what a user gives, [channels, samples] or [samples].

        Raises:
          UserError: it is no audio.
        """
        audio = np.atleast_2d(np.asarray(audio, np.float32))
        if audio.ndim != 2:
            raise UserError(f"audio of shape {audio.shape}: it must be [channels, samples] or [samples]")
        if audio.size == 0:
            raise UserError("the audio is empty")
        if audio.shape[0] > audio.shape[1]:
            raise UserError(
                f"audio of {audio.shape[0]} channels and {audio.shape[1]} samples: give [channels, samples]"
            )
        if not np.isfinite(audio).all():
            raise UserError("the audio holds NaN or infinite samples")
        if sample_rate <= 0:
            raise UserError(f"sample rate {sample_rate}: it must be positive")
        return cls(audio, sample_rate)

    @property
    def channels(self) -> int:
        return len(self.audio)

    def blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, self.audio.shape[1], BLOCK_SAMPLES):
            yield self.audio[:, start : start + BLOCK_SAMPLES]


class SongFile(AudioFile):
    """A song in a file, of which one block is in memory."""

    def blocks(self) -> Iterator[np.ndarray]:
        return self.read(BLOCK_SAMPLES)


@dataclasses.dataclass(frozen=True)
class Sum:
    """Songs of one rate times their `factors`, added; mono goes to all channels, and the longest sets the length.

    Raises:
      UserError: the songs have different rates or numbers of channels.
    """

    songs: Sequence[Song]
    factors: Sequence[float]

    def __post_init__(self) -> None:
        rates = sorted({song.sample_rate for song in self.songs})
        if len(rates) > 1:
            raise UserError(f"the stems have different sample rates ({', '.join(map(str, rates))} Hz)")
        channels = sorted({song.channels for song in self.songs})
        if len(set(channels) - {1}) > 1:
            raise UserError(f"the stems have different numbers of channels ({', '.join(map(str, channels))})")

    @property
    def sample_rate(self) -> int:
        return self.songs[0].sample_rate

    @property
    def channels(self) -> int:
        return max(song.channels for song in self.songs)

    def blocks(self) -> Iterator[np.ndarray]:
        for parts in itertools.zip_longest(*(song.blocks() for song in self.songs)):
            length = max(part.shape[1] for part in parts if part is not None)
            total = np.zeros((self.channels, length), np.float32)
            for part, factor in zip(parts, self.factors, strict=True):
                if part is not None:
                    total[:, : part.shape[1]] += part if factor == 1.0 else np.float32(factor) * part
            yield total


def song_file(path: str | Path) -> SongFile:
    """Opens a file; see `AudioFile` for what may be wrong with it."""
    return SongFile(Path(path))


def mono(song: Song, sample_rate: int) -> tuple[np.ndarray, int]:
    """(the mean of the channels at `sample_rate` Hz, float32 [samples]; the song's own number of samples)."""
    counted = 0

    def means() -> Iterator[np.ndarray]:
        nonlocal counted
        for block in song.blocks():
            counted += block.shape[1]
            yield block.mean(axis=0, dtype=np.float32, keepdims=True)

    line = np.concatenate(list(resampled(means(), song.sample_rate, sample_rate)), axis=1)[0]
    length = round(counted * sample_rate / song.sample_rate)
    return np.pad(line[:length], (0, max(0, length - len(line)))), counted


def whole(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Blocks [channels, n] as one array [channels, samples]."""
    return np.concatenate(list(blocks), axis=1)
