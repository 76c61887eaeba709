"""Audio in and out of files: `[channels, samples]` float32 in [-1, 1] inside, any of soundfile's formats outside."""

import io
import os
import tempfile
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
_WRITE_BLOCK = 1 << 16  # samples; libsndfile's Vorbis encoder overflows the stack on one long write


def read_audio(source: str | os.PathLike[str] | bytes) -> tuple[np.ndarray, int]:
    """Reads an audio file, or its bytes.

    Returns:
      (audio `[channels, samples]` float32, sample rate in Hz).

    Raises:
      UserError: the file is missing, unreadable, empty, or holds NaN or infinite samples.
    """
    if isinstance(source, bytes):
        name, size = "audio bytes", len(source)
    else:
        name, path = str(source), Path(source)
        if not path.is_file():
            raise UserError(f"{name}: no such audio file")
        size = path.stat().st_size
    if size == 0:
        raise UserError(f"{name}: the file is empty")
    try:
        audio, sample_rate = soundfile.read(
            io.BytesIO(source) if isinstance(source, bytes) else name, dtype="float32", always_2d=True
        )
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise UserError(f"{name}: not readable as audio ({error}); give a wav, flac, mp3 or ogg file") from error
    if len(audio) == 0:
        raise UserError(f"{name}: the file holds no audio samples")
    if not np.isfinite(audio).all():
        raise UserError(f"{name}: the audio holds NaN or infinite samples; export it again")
    return np.ascontiguousarray(audio.T), sample_rate


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
    path = Path(path)
    format = path.suffix.removeprefix(".").lower() if format is None else format
    if format not in FORMATS:
        raise unknown_name("audio format", format, FORMATS)
    container, encoding = FORMATS[format]
    samples = np.atleast_2d(audio).T
    if encoding == "PCM_24":  # libsndfile scales floats by 2^23 - 1, which would move every sample
        samples = np.round(np.clip(samples, -1.0, 1.0 - 2.0**-23) * 2.0**23).astype(np.int32) << 8
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        with soundfile.SoundFile(temporary, "w", sample_rate, samples.shape[1], encoding, format=container) as file:
            for start in range(0, len(samples), _WRITE_BLOCK):
                file.write(samples[start : start + _WRITE_BLOCK])
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
