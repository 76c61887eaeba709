"""Songs that are the same music, so that a split never has one on both sides: equal files, and music nearly equal.

Music becomes a set of hashes that survive what people do to files. Audio: pairs of spectral peaks (Wang 2003, "An
industrial-strength audio search algorithm"), which stand coding, resampling, gain, downmix and cut ends. Notes: runs of
intervals and rhythm ratios, which stand transposition, another tempo, other velocities and saving again. MinHash
(Broder 1997) makes every set a row of 128 numbers, of which two sets share as large a part as they overlap, and only
songs that agree in a band of two numbers are ever compared. Audio and notes are not compared with one another.
"""

import dataclasses
import hashlib
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import apache_beam as beam
import mido
import numpy as np
import scipy.fft
from apache_beam.pvalue import TaggedOutput
from scipy.ndimage import maximum_filter

from data_pipeline import decode, files
from data_pipeline.song import Song
from data_pipeline.sources import midi as midi_source
from subtractive_jax.errors import UserError
from subtractive_jax.representation.notes import PERCUSSION_CHANNEL

# Of the numbers of two signatures. Measured: different songs share up to 0.09 as audio and, unless they play the same
# bass line throughout, up to 0.10 as notes; a song and its copy at 22 kHz, without the first seconds and as mp3 at
# 64 kbit/s, from 0.21.
ALIKE = 0.15

_NUMBERS, _BAND = 128, 2
_FEWEST_HASHES = 24  # a smaller set is too common to tell songs apart
_LARGEST_GROUP = 1000  # compared pair by pair; the rest of a larger group only with its first song

_RATE = 8_000  # Hz; mp3 at 64 kbit/s keeps what is below 4 kHz
_WINDOW, _HOP = 1024, 256
_BINS = slice(16, 480)
_NEAR_FRAMES, _NEAR_BINS = 10, 20  # a peak is the highest of all that are as near as this
_FLOOR = 1e-6  # of the power of a song's highest peak
_PARTNERS, _MOST_FRAMES_AHEAD = 5, 63

_RUN = 8  # onsets
_LAST_TICK = 2**48  # a damaged file may hold larger ones than any integer type

_PERMUTATIONS = np.frombuffer(hashlib.shake_256(b"minhash").digest(16 * _NUMBERS), "<u8").reshape(_NUMBERS, 2)


@dataclasses.dataclass(frozen=True)
class Signature:
    """What is known of a song's music when it is compared.

    Attributes:
      song_id: the song's.
      digests: SHA-256 of every file that is not silent.
      minhash: 128 numbers below 2**32; none where there is too little music to tell it from other music.
    """

    song_id: str
    digests: tuple[bytes, ...]
    minhash: tuple[int, ...]


def signature(song: Song) -> Signature:
    """Reads all of a song's files, as streams.

    Raises:
      UserError: a file is unreadable.
    """
    if song.files[0][0] == "midi":
        ((_, path),) = song.files
        midi = midi_source.read(path)
        heard, hashes = {path} if _has_notes(midi) else set(), _runs(midi)
    else:
        heard, hashes = _landmarks([path for _, path in song.files])
    digests = tuple(_digest(path) for _, path in song.files if path in heard)
    return Signature(song.song_id, digests, _minhash(np.unique(hashes)))


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The share of equal numbers in signatures `[..., 128]`, which estimates how much of their music is common."""
    return np.mean(a == b, axis=-1)


def _digest(path: str) -> bytes:
    with files.open_file(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.digest()


def _mix(values: np.ndarray) -> np.ndarray:
    """Spreads uint64 over all of their bits (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _minhash(hashes: np.ndarray) -> tuple[int, ...]:
    if len(hashes) < _FEWEST_HASHES:
        return ()
    return tuple(
        int((hashes * (factor | np.uint64(1)) + term).min() >> np.uint64(32)) for factor, term in _PERMUTATIONS
    )


def _landmarks(paths: Sequence[str]) -> tuple[set[str], np.ndarray]:
    """The files that are not silent, and the hashes of the sum of all: two frequencies and the time between."""
    notes: list[str] = []
    streams = [(path, decode.open_audio(path, _RATE, notes)) for path in paths]
    order = list(dict.fromkeys(paths))
    heard: set[str] = set()

    def mixed() -> Iterator[np.ndarray]:
        for block in decode.together(streams, _RATE, notes, max_difference_seconds=math.inf):
            heard.update(order[row] for row in np.flatnonzero(block.any(axis=1)))
            yield block.sum(axis=0)

    frame, frequency, power = (np.concatenate(found) for found in zip(*_peaks(mixed()), strict=True))
    loud = power > _FLOOR * power.max(initial=0.0)
    frame, frequency = frame[loud], frequency[loud] // 2  # cutting and coding move peaks by a bin or a frame
    hashes = []
    for partner in range(1, _PARTNERS + 1):
        ahead = frame[partner:] - frame[:-partner]
        packed = (frequency[:-partner] << 16) | (frequency[partner:] << 6) | (ahead // 2)
        hashes.append(packed[(ahead > 0) & (ahead <= _MOST_FRAMES_AHEAD)])
    return heard, _mix(np.concatenate(hashes).astype(np.uint64))


def _peaks(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Frames, bins and powers of the spectrogram's peaks, in order of time, whatever the blocks' lengths."""
    window = np.hanning(_WINDOW).astype(np.float32)
    margin = np.zeros(_NEAR_FRAMES * _HOP, np.float32)
    held, first = margin, 0
    for block in itertools.chain(blocks, [margin, np.zeros(_WINDOW, np.float32)]):
        held = np.concatenate([held, block])
        count = (len(held) - _WINDOW) // _HOP + 1 - 2 * _NEAR_FRAMES  # frames with all of their neighbours
        if count > 0:
            frames = np.lib.stride_tricks.sliding_window_view(held, _WINDOW)[::_HOP]
            spectrum = scipy.fft.rfft(frames * window)[:, _BINS]
            power = spectrum.real**2 + spectrum.imag**2
            highest = maximum_filter(power, (2 * _NEAR_FRAMES + 1, 2 * _NEAR_BINS + 1), mode="constant")
            inner = slice(_NEAR_FRAMES, _NEAR_FRAMES + count)
            frame, frequency = np.nonzero((power[inner] == highest[inner]) & (power[inner] > 0.0))
            yield first + frame, frequency, power[inner][frame, frequency]
            held, first = held[count * _HOP :], first + count


def _has_notes(midi: mido.MidiFile) -> bool:
    return any(message.type == "note_on" and message.velocity for track in midi.tracks for message in track)


def _runs(midi: mido.MidiFile) -> np.ndarray:
    """The hashes of all runs of `_RUN` onsets of a channel: steps of the top note, chords below it, ratios of times."""
    played: dict[int, set[tuple[int, int]]] = {}
    for track in midi.tracks:
        tick = 0
        for message in track:
            tick = min(tick + message.time, _LAST_TICK)
            if message.type == "note_on" and message.velocity:
                played.setdefault(message.channel, set()).add((tick, message.note))
    hashes = [np.zeros(0, np.uint64)]
    for channel, notes in sorted(played.items()):
        ticks, keys = np.array(sorted(notes)).T
        chord_ticks = (ticks[-1] - ticks[0]) / len(ticks) / 4  # notes closer than this start together
        starts = np.flatnonzero(np.diff(ticks, prepend=-np.inf) > chord_ticks)
        if len(starts) < _RUN + 2:
            continue
        top = np.maximum.reduceat(keys, starts)
        if channel == PERCUSSION_CHANNEL:
            members, steps = keys % 64, np.zeros_like(top[2:])
        else:
            members, steps = (np.repeat(top, np.diff(starts, append=len(keys))) - keys) % 12, np.diff(top)[1:]
        chords = np.bitwise_or.reduceat(np.uint64(1) << members.astype(np.uint64), starts)[2:]
        times = np.diff(ticks[starts])
        ratios = np.clip(np.round(2.0 * np.log2(times[1:] / times[:-1])), -7, 7).astype(np.int64)  # half octaves
        onsets = _mix(_mix(chords) + ((steps + 128) << 4 | ratios + 8).astype(np.uint64))
        powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(_RUN, dtype=np.uint64)
        hashes.append(_mix(np.lib.stride_tricks.sliding_window_view(onsets, _RUN) @ powers))
    return np.concatenate(hashes)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of comparing songs.

    Attributes:
      kind: `alike`: two songs are the same music; `unreadable`: a song was compared with none; `crowded`: a song begins
        a group so large that most of the group were compared with it alone.
      song_ids: the two, the alphabetically first one first; or the one.
      reason: why a song is unreadable.
    """

    kind: Literal["alike", "unreadable", "crowded"]
    song_ids: tuple[str, ...]
    reason: str = ""


class FindAlike(beam.PTransform):
    """`Song`s to `Finding`s, each once.

    Of many songs that are all alike, not all pairs are found, but enough to join them. A song costs the shuffle 64
    times its id and 140 bytes.
    """

    def expand(self, songs: beam.PCollection[Song]) -> beam.PCollection[Finding]:
        signed = songs | beam.Reshuffle() | beam.ParDo(_Sign()).with_outputs("unreadable", main="signatures")
        equal = signed.signatures | beam.FlatMap(_by_file) | "SameFile" >> beam.GroupByKey() | beam.FlatMap(_with_first)
        bands = signed.signatures | beam.FlatMap(_by_band) | "SameBand" >> beam.GroupByKey()
        near = bands | beam.ParDo(_Compare()).with_outputs("crowded", main="pairs")
        pairs = (equal, near.pairs) | "Pairs" >> beam.Flatten() | "Once" >> beam.Distinct()
        alike = pairs | "Alike" >> beam.Map(lambda pair: Finding("alike", pair))
        first = near.crowded | "FirstOnce" >> beam.Distinct()
        crowded = first | "Crowded" >> beam.Map(lambda song_id: Finding("crowded", (song_id,)))
        return (alike, crowded, signed.unreadable) | beam.Flatten()


class _Sign(beam.DoFn):
    def process(self, song: Song) -> Iterator[Signature | TaggedOutput[Literal["unreadable"], Finding]]:
        try:
            yield signature(song)
        except UserError as error:
            yield TaggedOutput("unreadable", Finding("unreadable", (song.song_id,), str(error)))


def _by_file(song: Signature) -> Iterator[tuple[bytes, str]]:
    for digest in set(song.digests):
        yield digest, song.song_id


def _with_first(group: tuple[bytes, Iterable[str]]) -> Iterator[tuple[str, str]]:
    first = min(group[1])
    yield from ((first, song_id) for song_id in group[1] if song_id != first)


def _by_band(song: Signature) -> Iterator[tuple[bytes, tuple[str, bytes]]]:
    """A key for every band. The low bytes of all numbers are enough to compare (Li and König 2010)."""
    numbers = np.array(song.minhash, "<u4")
    low = numbers.astype(np.uint8).tobytes()
    for band, own in enumerate(numbers.reshape(-1, _BAND)):
        yield bytes([band]) + own.tobytes(), (song.song_id, low)


class _Compare(beam.DoFn):
    """The songs of a band to pairs that join all that are alike, directly or through others; of too many, the first."""

    def process(
        self, group: tuple[bytes, Iterable[tuple[str, bytes]]]
    ) -> Iterator[tuple[str, str] | TaggedOutput[Literal["crowded"], str]]:
        members = heapq.nsmallest(_LARGEST_GROUP + 1, group[1])
        if len(members) > _LARGEST_GROUP:
            yield TaggedOutput("crowded", members[0][0])
            first, numbers = members[0][0], _numbers(members[:1])
            for member in group[1]:
                if member[0] != first and similarity(_numbers([member]), numbers) >= ALIKE:
                    yield first, member[0]
        members = members[:_LARGEST_GROUP]
        numbers = _numbers(members)
        family = np.arange(len(members))
        for i, (song_id, _) in enumerate(members):
            alike = i + 1 + np.flatnonzero(similarity(numbers[i + 1 :], numbers[i]) >= ALIKE)
            new = alike[family[alike] != family[i]]
            family[np.isin(family, family[new])] = family[i]
            yield from ((song_id, members[j][0]) for j in new)


def _numbers(members: list[tuple[str, bytes]]) -> np.ndarray:
    return np.frombuffer(b"".join(low for _, low in members), np.uint8).reshape(-1, _NUMBERS)
