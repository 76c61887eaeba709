"""A drawn stem in its place: what was rendered at the model's rate, put into the song block by block."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from subtractive_jax.representation.audio import resampled
from subtractive_jax.sampling.song import BLOCK_SAMPLES, Song, whole

FADE_SECONDS = 0.01  # where a stem starts or ends inside the song
MAX_LOWERING_DB = 6.0  # how far a stem is turned down to keep the mix below full scale
_GRID = 2.0**23  # 24-bit steps in [0, 1)
_TRUE_PEAK_RATE = 176_400  # Hz; BS.1770-4, annex 2: four times the rate of common audio


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a song something new may be heard. In samples at the song's rate.

    Attributes:
      first, last: from and to where.
      samples: of the song.
      sample_rate: of the song, in Hz.
    """

    first: int
    last: int
    samples: int
    sample_rate: int

    def curve(self, start: int, length: int) -> np.ndarray:
        """1 inside, 0 outside, with short ramps at ends that lie inside the song: float32 [length] from `start` on."""
        fade = min(round(FADE_SECONDS * self.sample_rate), (self.last - self.first) // 2)
        at = np.arange(start, start + length) + 0.5
        curve = ((at > self.first) & (at < self.last)).astype(np.float64)
        if self.first > 0 and fade:
            curve = np.minimum(curve, np.clip((at - self.first) / fade, 0.0, 1.0))
        if self.last < self.samples and fade:
            curve = np.minimum(curve, np.clip((self.last - at) / fade, 0.0, 1.0))
        return curve.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Line:
    """Mono audio [samples] float32 at `sample_rate` that begins at the song's sample `start`."""

    audio: np.ndarray
    sample_rate: int
    start: int

    def blocks(self, place: Place) -> Iterator[np.ndarray]:
        """The line as long as the song, in its blocks, under the place's curve."""
        heard = resampled(_cut(self.audio[None]), self.sample_rate, place.sample_rate)
        stream = itertools.chain(
            _silence(self.start), heard, itertools.repeat(np.zeros((1, BLOCK_SAMPLES), np.float32))
        )
        rest = np.zeros((1, 0), np.float32)
        for start in range(0, place.samples, BLOCK_SAMPLES):
            length = min(BLOCK_SAMPLES, place.samples - start)
            while rest.shape[1] < length:
                rest = np.concatenate([rest, next(stream)], axis=1)
            yield rest[0, :length] * place.curve(start, length)
            rest = rest[:, length:]


def on_grid(audio: np.ndarray) -> np.ndarray:
    """Rounds float32 samples to those of 24-bit audio."""
    return np.round(audio * np.float32(_GRID)) / np.float32(_GRID)


def _cut(audio: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, audio.shape[1], BLOCK_SAMPLES):
        yield audio[:, start : start + BLOCK_SAMPLES]


def _silence(samples: int) -> Iterator[np.ndarray]:
    for start in range(0, samples, BLOCK_SAMPLES):
        yield np.zeros((1, min(BLOCK_SAMPLES, samples - start)), np.float32)


@dataclasses.dataclass(frozen=True)
class Insertion:
    """A new stem in its song, read block by block; `stem` and `mix` are the whole.

    Attributes:
      song: without the stem.
      place: where the new stem was to go.
      new_stem: what was rendered.
      new_mix: of a model that writes the full mix, which is then not the song plus a stem, and the stem an estimate.
      gain: factor of the new stem.
      old_stem: what the song had there before, which stays outside `place`.
      info: settings, measures (`gates.figures`) and timings, as they go into `result.json`.
    """

    song: Song
    place: Place
    new_stem: Line
    new_mix: Line | None = None
    gain: float = 1.0
    old_stem: Song | None = None
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sample_rate(self) -> int:
        """The song's, in Hz."""
        return self.place.sample_rate

    @property
    def channels(self) -> int:
        """The song's."""
        return self.song.channels

    @property
    def estimated(self) -> bool:
        """Whether the model wrote the mix, and the stem is only what the mix has more than the song."""
        return self.new_mix is not None

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(song, stem, mix) [channels, n] float32; for a stem target mix = song + stem in every sample.

        The stem lies on the grid of 24-bit audio, where every sum with an input of up to 24 bits is exact in float32.
        """
        outside = self.old_stem.blocks() if self.old_stem else itertools.repeat(np.zeros((1, 1), np.float32))
        mixes = self.new_mix.blocks(self.place) if self.new_mix else itertools.repeat(np.zeros(1, np.float32))
        start = 0
        for song, new, new_mix, old in zip(
            self.song.blocks(), self.new_stem.blocks(self.place), mixes, outside, strict=False
        ):
            length = song.shape[1]
            stays = 1.0 - self.place.curve(start, length)
            if self.old_stem:
                old = np.pad(old, ((0, 0), (0, max(0, length - old.shape[1]))))[:, :length]
            stem = np.float32(self.gain) * new + stays * old
            stem = on_grid(np.broadcast_to(stem, song.shape))
            yield song, stem, new_mix + stays * (song + old) if self.new_mix else song + stem
            start += length

    def blocks(self) -> Iterator[np.ndarray]:
        """The mix, so that it can be the song for another stem."""
        return (mix for _, _, mix in self.parts())

    @property
    def stem(self) -> np.ndarray:
        """[channels, samples] float32, as loud as it is in the mix."""
        return whole(stem for _, stem, _ in self.parts())

    @property
    def mix(self) -> np.ndarray:
        """[channels, samples] float32."""
        return whole(self.blocks())


@dataclasses.dataclass(frozen=True)
class Levels:
    """What is heard when an insertion is read once.

    Attributes:
      true_peak: of the mix, between samples too (ITU-R BS.1770-4, annex 2); 1 is full scale.
      limit: what it may be: full scale, or the song's own true peak where this is above.
      lowering_db: how much softer the stem must be for the mix to stay below `limit`; `MAX_LOWERING_DB` at most: a song
        mastered to full scale would silence its new stem.
      max_error: the largest difference of mix - stem and song in any sample.
    """

    true_peak: float
    limit: float
    lowering_db: float
    max_error: float


def levels(insertion: Insertion) -> Levels:
    """Reads an insertion twice: for the song's own peak, and for the mix."""
    rate = insertion.sample_rate
    factor = max(1, round(_TRUE_PEAK_RATE / rate))

    def between(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return resampled(blocks, rate, factor * rate)

    limit = max(1.0, max(_peak(block) for block in between(insertion.song.blocks())))
    room, peak, error = 1.0, 0.0, 0.0

    def both() -> Iterator[np.ndarray]:
        nonlocal error
        for song, stem, mix in insertion.parts():
            error = max(error, _peak(mix - stem - song))
            yield np.concatenate([mix, stem])

    for block in between(both()):
        mix, stem = np.split(block, 2)
        peak = max(peak, _peak(mix))
        over = np.abs(mix) > limit
        if over.any():
            song = mix[over] - stem[over]
            room = min(room, float(((limit - song * np.sign(stem[over])) / np.abs(stem[over])).min()))
    lowering = 0.0 if room >= 1.0 else min(MAX_LOWERING_DB, -20.0 * np.log10(max(room, 1e-6)))
    return Levels(peak, limit, float(lowering), error)


def _peak(audio: np.ndarray) -> float:
    return float(np.abs(audio).max(initial=0.0))
