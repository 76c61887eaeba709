"""Audio in and out of files: `[channels, samples]` float32 in [-1, 1] inside, any of soundfile's formats outside."""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from subtractive_jax.errors import UserError, unknown_name

FORMATS = {  # what is written for each suffix: libsndfile's container and encoding
    "wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_24"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
}
_READ_BLOCK = 1 << 20  # samples
_WRITE_BLOCK = 1 << 16  # samples; libsndfile's Vorbis encoder overflows the stack on one long write


class AudioFile:
    """An audio file, read in blocks from its beginning, any number of times.

    Attributes:
      path: where it is.
      sample_rate: in Hz.
      channels: number of channels.

    Raises:
      UserError: the file is missing, empty or unreadable.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such audio file")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        with _readable(str(path)), soundfile.SoundFile(path) as file:
            self.sample_rate, self.channels = file.samplerate, file.channels
            if file.frames == 0:
                raise UserError(f"{path}: the file holds no audio samples")

    def read(self, samples: int) -> Iterator[np.ndarray]:
        """`[channels, samples]` float32; the last block may be shorter.

        Raises:
          UserError: the file is damaged, or holds NaN or infinite samples.
        """
        with _readable(str(self.path)), soundfile.SoundFile(self.path) as file:
            while len(block := file.read(samples, dtype="float32", always_2d=True)):
                yield _finite(block, str(self.path))


def read_audio(source: str | os.PathLike[str] | bytes) -> tuple[np.ndarray, int]:
    """Reads an audio file, or its bytes.

    Returns:
      (audio `[channels, samples]` float32, sample rate in Hz).

    Raises:
      UserError: the file is missing, unreadable, empty, or holds NaN or infinite samples.
    """
    if not isinstance(source, bytes):
        file = AudioFile(Path(source))
        return np.concatenate(list(file.read(_READ_BLOCK)), axis=1), file.sample_rate
    if not source:
        raise UserError("audio bytes: the file is empty")
    with _readable("audio bytes"):
        audio, sample_rate = soundfile.read(io.BytesIO(source), dtype="float32", always_2d=True)
    if len(audio) == 0:
        raise UserError("audio bytes: the file holds no audio samples")
    return _finite(audio, "audio bytes"), sample_rate


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns the library's errors into ours."""
    try:
        yield
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise UserError(f"{name}: not readable as audio ({error}); give a wav, flac, mp3 or ogg file") from error


def _finite(audio: np.ndarray, name: str) -> np.ndarray:
    """`[samples, channels]` to `[channels, samples]`."""
    if not np.isfinite(audio).all():
        raise UserError(f"{name}: the audio holds NaN or infinite samples; export it again")
    return np.ascontiguousarray(audio.T)


def resampled(blocks: Iterable[np.ndarray], from_rate: int, to_rate: int) -> Iterator[np.ndarray]:
    """A stream of blocks `[channels, n]` as `resample` would give the whole, in blocks of other lengths."""
    stream = None
    for block in blocks:
        if from_rate == to_rate:
            yield block
            continue
        if stream is None:
            stream = soxr.ResampleStream(from_rate, to_rate, len(block), dtype="float32", quality="HQ")
        yield stream.resample_chunk(np.ascontiguousarray(block.T, np.float32)).T
    if stream is not None:
        yield stream.resample_chunk(np.zeros((0, len(block)), np.float32), last=True).T


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resamples `[samples]` or `[channels, samples]` (soxr, high quality) to `round(samples * to_rate / from_rate)`."""
    if from_rate == to_rate:
        return audio
    length = round(audio.shape[-1] * to_rate / from_rate)
    resampled = soxr.resample(audio.T, from_rate, to_rate, quality="HQ").T[..., :length]
    widths = [(0, 0)] * (audio.ndim - 1) + [(0, length - resampled.shape[-1])]
    return np.ascontiguousarray(np.pad(resampled, widths), dtype=np.float32)


def to_mono(audio: np.ndarray) -> np.ndarray:
    """`[channels, samples]` to the mean of the channels `[samples]`."""
    return audio.mean(axis=0, dtype=np.float32)


def write_audio(path: str | os.PathLike[str], audio: np.ndarray, sample_rate: int, format: str | None = None) -> None:
    """Writes `[channels, samples]` or `[samples]`: wav as 32-bit float, flac as 24-bit, mp3 and ogg at their defaults.

    The file appears under its name only when it is complete.

    Args:
      format: a key of `FORMATS`; the path's suffix when None.

    Raises:
      UserError: the format is unknown, or cannot hold this sample rate or number of channels.
    """
    with audio_writer(path, len(np.atleast_2d(audio)), sample_rate, format) as write:
        write(np.atleast_2d(audio))


def check_format(format: str, channels: int, sample_rate: int) -> None:
    """Asks the library, so that nobody waits for music that cannot be written.

    Raises:
      UserError: the format is unknown, or cannot hold this sample rate or number of channels.
    """
    if format not in FORMATS:
        raise unknown_name("audio format", format, FORMATS)
    container, encoding = FORMATS[format]
    try:
        soundfile.SoundFile(io.BytesIO(), "w", sample_rate, channels, encoding, format=container).close()
    except soundfile.LibsndfileError as error:
        why = f"{format} cannot hold {channels} channels at {sample_rate} Hz ({error.error_string})"
        raise UserError(f"{why}: choose another format") from error


@contextlib.contextmanager
def audio_writer(
    path: str | os.PathLike[str], channels: int, sample_rate: int, format: str | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that takes blocks `[channels, samples]`; the rest as in `write_audio`."""
    path = Path(path)
    format = path.suffix.removeprefix(".").lower() if format is None else format
    check_format(format, channels, sample_rate)
    container, encoding = FORMATS[format]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        with soundfile.SoundFile(temporary, "w", sample_rate, channels, encoding, format=container) as file:

            def write(block: np.ndarray) -> None:
                samples = block.T
                if encoding == "PCM_24":  # libsndfile scales floats by 2^23 - 1, which would move every sample
                    samples = np.round(np.clip(samples, -1.0, 1.0 - 2.0**-23) * 2.0**23).astype(np.int32) << 8
                for start in range(0, len(samples), _WRITE_BLOCK):
                    file.write(samples[start : start + _WRITE_BLOCK])

            yield write
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written as {format} at {sample_rate} Hz ({error})") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def flac_bytes(samples: np.ndarray, sample_rate: int) -> bytes:
    """Mono `[samples]` int16 as a 16-bit FLAC file, lossless: `read_audio` returns `samples / 32768`."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
