"""Metrics of a run: `metrics.jsonl`, and the same scalars with pictures and sounds as TensorBoard events.

The event files are written here because the usual writers (clu's, TensorBoard's own) import TensorFlow.
"""

import contextlib
import io
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
import soundfile

from subtractive_jax.records import frame

FILE_NAME = "metrics.jsonl"


def _tag(field: int, wire_type: int) -> bytes:
    return bytes([field << 3 | wire_type])


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(encoded + bytes([value]))


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _real(field: int, value: float) -> bytes:
    return _tag(field, 5) + struct.pack("<f", value)


def _event(step: int, content: bytes) -> bytes:
    """tensorflow.Event: wall_time = 1, step = 2, and one of its contents."""
    return frame(_tag(1, 1) + struct.pack("<d", time.time()) + _number(2, step) + content)


def _file_version() -> bytes:
    return _message(3, b"brain.Event:2")


def _restart() -> bytes:
    """SessionLog.START: TensorBoard drops what an earlier file holds from this step on."""
    return _message(7, _number(1, 1))


class Sound(NamedTuple):
    """Mono audio [samples] float in [-1, 1], and its rate in Hz."""

    samples: np.ndarray
    sample_rate: int


def _image(png: bytes) -> bytes:
    """tensorflow.Summary.Image."""
    width, height = struct.unpack(">II", png[16:24])  # every PNG begins with signature and IHDR
    return _number(1, height) + _number(2, width) + _number(3, 3) + _message(4, png)


def _audio(sound: Sound) -> bytes:
    """tensorflow.Summary.Audio."""
    wav = io.BytesIO()
    soundfile.write(wav, sound.samples, sound.sample_rate, format="WAV", subtype="PCM_16")
    numbers = _real(1, sound.sample_rate) + _number(2, 1) + _number(3, len(sound.samples))
    return numbers + _message(4, wav.getvalue()) + _message(5, b"audio/wav")


def _summary(scalars: Mapping[str, float], images: Mapping[str, bytes], sounds: Mapping[str, Sound]) -> bytes:
    contents = [(name, _real(2, value)) for name, value in scalars.items()]
    contents += [(name, _message(4, _image(png))) for name, png in images.items()]
    contents += [(name, _message(6, _audio(sound))) for name, sound in sounds.items()]
    return _message(5, b"".join(_message(1, _message(1, name.encode()) + content) for name, content in contents))


class Log:
    """What `open_log` yields."""

    def __init__(self, lines: TextIO, events: BinaryIO) -> None:
        self._lines, self._events = lines, events

    def __call__(
        self,
        step: int,
        scalars: Mapping[str, float],
        images: Mapping[str, bytes] = {},
        sounds: Mapping[str, Sound] = {},
    ) -> None:
        """Writes what was measured after `step` updates; `images` are PNG files. Names with a `/` are grouped."""
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        self._events.write(_event(step, _summary(scalars, images, sounds)))
        self._events.flush()


@contextlib.contextmanager
def open_log(run_dir: str | os.PathLike[str], step: int) -> Iterator[Log]:
    """A log to go on with; what the run logged after `step`, from which it continues, is dropped first."""
    path = Path(run_dir) / FILE_NAME
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        os.replace(temporary, path)
    events_name = f"events.out.tfevents.{time.time_ns() // 1_000_000}.{socket.gethostname()}"
    with open(path, "a") as jsonl, open(Path(run_dir) / events_name, "ab") as events:
        events.write(_event(0, _file_version()) + _event(step + 1, _restart()))
        yield Log(jsonl, events)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the line that was being written when the process was killed
        return float("inf")
