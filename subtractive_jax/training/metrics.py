"""Metrics of a run: `metrics.jsonl`, and the same scalars as TensorBoard events.

The event files are written here because the usual writers (clu's, TensorBoard's own) import TensorFlow.
"""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


def _event(step: int, content: bytes) -> bytes:
    """tensorflow.Event: wall_time = 1, step = 2, and one of its contents."""
    return frame(_tag(1, 1) + struct.pack("<d", time.time()) + _tag(2, 0) + _varint(step) + content)


def _file_version() -> bytes:
    return _message(3, b"brain.Event:2")


def _restart() -> bytes:
    """SessionLog.START: TensorBoard drops what an earlier file holds from this step on."""
    return _message(7, _tag(1, 0) + _varint(1))


def _summary(scalars: dict[str, float]) -> bytes:
    values = (
        _message(1, _message(1, name.encode()) + _tag(2, 5) + struct.pack("<f", value))
        for name, value in scalars.items()
    )
    return _message(5, b"".join(values))


@contextlib.contextmanager
def open_log(run_dir: str | os.PathLike[str], step: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yields `write(step, scalars)`; what the run logged after `step`, from which it continues, is dropped first."""
    path = Path(run_dir) / FILE_NAME
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        os.replace(temporary, path)
    events_name = f"events.out.tfevents.{time.time_ns() // 1_000_000}.{socket.gethostname()}"
    with open(path, "a") as jsonl, open(Path(run_dir) / events_name, "ab") as events:
        events.write(_event(0, _file_version()) + _event(step + 1, _restart()))

        def write(step: int, scalars: dict[str, float]) -> None:
            jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
            jsonl.flush()
            events.write(_event(step, _summary(scalars)))
            events.flush()

        yield write


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the line that was being written when the process was killed
        return float("inf")
