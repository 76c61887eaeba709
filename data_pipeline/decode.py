"""Audio files as streams: decoded, downmixed and resampled a block at a time, so memory does not grow with length."""

import copy
import itertools
import os
import re
from collections.abc import Generator, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from data_pipeline import files
from data_pipeline.song import Recording, Song, Tools
from subtractive_jax.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")  # what loses nothing comes first
_BLOCK = 1 << 17  # samples of all channels together: they stay in a core's cache
_POSSIBLE_RATES = (4_000, 768_000)  # Hz; anything else is a damaged header
_USUAL_RATES = (16_000, 96_000)
_UNKNOWN_FRAMES = 1 << 62  # libsndfile gives the largest integer where the header does not count the frames
_UNKNOWN_BYTES = 0x7FFF0000  # programs that write a wav to a pipe announce at least this
_MAX_DIFFERENCE_SECONDS = 0.05  # between stems: encoders pad, and exports end a little apart


class _Source:
    """A file for libsndfile, which takes an error while reading for the end of the file: `error` keeps it."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell = file.seek, file.tell
        self.error: Exception | None = None
        self._file = file

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:  # clients of cloud storage have exceptions of their own
            self.error = error
            return b""


class _Decoder(soundfile.SoundFile):
    """soundfile seeks to where it already is after every read, and a FLAC of unknown length cannot."""

    def seekable(self) -> bool:
        return False


def _has_xing_header(file: BinaryIO) -> bool:
    """Whether an MP3 tells its length; that of any other libsndfile guesses from the file's size."""
    file.seek(0)
    tag = file.read(10)
    if tag.startswith(b"ID3"):  # whose size has seven bits a byte
        file.seek(10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True)))
    start = file.read(1024)
    return b"Xing" in start or b"Info" in start


def _has_last_page(file: BinaryIO) -> bool:
    """Whether the last page of an Ogg file is all there and says that it is the last."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 17)))  # twice the longest page
    end = file.read()
    page = end[max(0, end.rfind(b"OggS")) :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    return bool(segments) and bool(page[5] & 4) and 27 + len(segments) + sum(segments) <= len(page)


def _is_cut_short(file: BinaryIO, decoder: soundfile.SoundFile, frames: int) -> bool:
    """Whether a file that was read to its end held fewer frames than its header promises."""
    if decoder.format == "MP3" and not _has_xing_header(file):
        return False
    if decoder.format == "OGG" and not _has_last_page(file):
        return True
    # libsndfile corrects the length of a wav in silence, and only its log tells.
    wav = re.search(r"^data : (\d+) \(should be \d+\)", decoder.extra_info, re.MULTILINE)
    return frames < decoder.frames < _UNKNOWN_FRAMES or (wav is not None and int(wav[1]) < _UNKNOWN_BYTES)


def _downmix(block: np.ndarray, channels: int) -> np.ndarray:
    """`[samples, any]` to `[samples, channels]`: as it is where the number agrees, otherwise the mean of all.

    A matrix product: np.mean takes forty times as long.
    """
    if block.shape[1] == channels:
        return block
    with np.errstate(all="ignore"):  # what is not finite is refused later
        return block @ np.full((block.shape[1], channels), 1.0 / block.shape[1], np.float32)


def open_audio(path: str, sample_rate: int, notes: list[str], channels: int = 1) -> Iterator[np.ndarray]:
    """An audio file as a stream of float32 blocks, in all `round(frames * sample_rate / its own rate)` samples.

    Together they are what `representation.audio` reads, mixes down and resamples from the whole file.

    Args:
      path: in any file system that Beam knows.
      sample_rate: of the stream, in Hz.
      notes: gets a line for whatever is unusual about the file.
      channels: 1 for blocks `[samples]`, 2 for blocks `[2, samples]`; other numbers of channels are averaged.

    Raises:
      UserError: while blocks are read: the file is missing, unreadable, empty, cut short, or holds NaN or infinite
        samples. An MP3 without a Xing header does not say how long it is: a cut one is a shorter song, and libsndfile
        may stop early where its bit rate varies.
    """
    with files.open_file(path) as file:
        if not file.read(1):
            raise UserError(f"{path}: the file is empty")
        file.seek(0)
        source = _Source(file)
        try:
            with _Decoder(source) as decoder:
                frames = yield from _resampled(path, decoder, sample_rate, notes, channels)
                if source.error:  # the storage's fault, not the file's
                    raise source.error
                if _is_cut_short(file, decoder, frames):
                    why = f"its header promises more than the {frames} frames that are there"
                    raise UserError(f"{path}: cut short ({why}); copy or export it again")
        except soundfile.LibsndfileError as error:
            if source.error:
                raise source.error from error
            why = error.error_string.rstrip(".")
            raise UserError(f"{path}: not readable as audio ({why}); give a wav, flac, mp3 or ogg file") from error


def _resampled(
    path: str, decoder: soundfile.SoundFile, sample_rate: int, notes: list[str], channels: int
) -> Generator[np.ndarray, None, int]:
    """Yields the stream's blocks and returns how many frames the file held."""
    rate, name = decoder.samplerate, files.name(path)
    if not _POSSIBLE_RATES[0] <= rate <= _POSSIBLE_RATES[1]:
        raise UserError(f"{path}: a sample rate of {rate} Hz is not possible; export it again")
    if not _USUAL_RATES[0] <= rate <= _USUAL_RATES[1]:
        notes.append(f"{name}: resampled from {rate} Hz")
    if decoder.channels > 2:
        notes.append(f"{name}: {decoder.channels} channels averaged")
    resampler = None if rate == sample_rate else soxr.ResampleStream(rate, sample_rate, channels, "float32", "HQ")
    frames = samples = 0
    at_end = False
    while not at_end:
        block = decoder.read(max(1, _BLOCK // decoder.channels), dtype="float32", always_2d=True)
        at_end = len(block) == 0
        frames += len(block)
        block = _downmix(block, channels)
        if resampler:
            block = resampler.resample_chunk(block, last=at_end)
        if at_end:  # soxr may end a sample off
            missing = round(frames * sample_rate / rate) - samples
            block = np.pad(block[:missing], ((0, max(0, missing - len(block))), (0, 0)))
        if not np.isfinite(block).all():
            raise UserError(f"{path}: the audio holds NaN or infinite samples; export it again")
        samples += len(block)
        if len(block):
            yield block[:, 0] if channels == 1 else np.ascontiguousarray(block.T)
    if samples == 0:
        raise UserError(f"{path}: the file holds no audio samples")
    return frames


def _even(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of one size, the last one shorter."""
    held: list[np.ndarray] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        if count >= size:
            joined = np.concatenate(held)
            whole = count // size * size
            yield from (joined[start : start + size] for start in range(0, whole, size))
            held, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(held)


def together(
    streams: Sequence[tuple[str, Iterator[np.ndarray]]],
    sample_rate: int,
    notes: list[str],
    max_difference_seconds: float = _MAX_DIFFERENCE_SECONDS,
) -> Iterator[np.ndarray]:
    """Streams side by side, as blocks `[stems, samples]` float32.

    Args:
      streams: (stem, blocks `[samples]` of any lengths); streams of one stem are added up. The stems' order of first
        appearance is that of the rows.
      sample_rate: of all streams, in Hz.
      notes: gets a line where streams of different lengths were padded with silence.
      max_difference_seconds: between the shortest and the longest stream.

    Raises:
      UserError: at the end: the lengths differ by more.
    """
    rows = {stem: row for row, stem in enumerate(dict.fromkeys(stem for stem, _ in streams))}
    lengths = [0] * len(streams)
    even = [_even(blocks, _BLOCK) for _, blocks in streams]
    for chunks in itertools.zip_longest(*even, fillvalue=np.zeros(0, np.float32)):
        block = np.zeros((len(rows), max(len(chunk) for chunk in chunks)), np.float32)
        for i, ((stem, _), chunk) in enumerate(zip(streams, chunks, strict=True)):
            block[rows[stem], : len(chunk)] += chunk
            lengths[i] += len(chunk)
        yield block
    shortest, longest = min(lengths), max(lengths)
    if longest > shortest:
        (first, _), (last, _) = streams[lengths.index(shortest)], streams[lengths.index(longest)]
        difference = f"{first} lasts {shortest / sample_rate:.2f} s and {last} {longest / sample_rate:.2f} s"
        if longest - shortest > max_difference_seconds * sample_rate:
            raise UserError(f"{difference}; export all stems of a song with one length")
        notes.append(f"{difference}: padded")


def load_stems(
    song: Song, sample_rate: int, tools: Tools, max_difference_seconds: float = _MAX_DIFFERENCE_SECONDS
) -> Recording:
    """A source's `load` where the song's files are its stems.

    Raises:
      UserError: while blocks are read: a file is unreadable, or lengths differ by more than `max_difference_seconds`.
    """
    notes: list[str] = []
    streams = [(stem, open_audio(path, sample_rate, notes)) for stem, path in song.files]
    stems = tuple(dict.fromkeys(stem for stem, _ in streams))
    tags = {"stems": {stem: {} for stem in stems}} | copy.deepcopy(song.tags)
    return Recording(stems, together(streams, sample_rate, notes, max_difference_seconds), tags, notes=notes)
