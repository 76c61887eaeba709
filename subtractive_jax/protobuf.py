"""Protobuf's wire format: the fields of a message, without its schema.

Enough for the two messages that are read here: `tf.train.Example` and SentencePiece's `ModelProto`.
"""

from collections.abc import Iterator
from typing import Any

_VARINT, _FIXED64, LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, value) of a message; values are ints or memoryviews.

    Raises:
      IndexError, KeyError: it is not a message.
    """
    position = 0
    while position < len(data):
        tag, position = data[position], position + 1
        if tag >= 0x80:  # a call a byte would take most of the time of reading small records
            tag, position = _varint(data, position - 1)
        number, wire_type = tag >> 3, tag & 7
        value: int | memoryview
        if wire_type == _VARINT:
            value, position = _varint(data, position)
        else:
            if wire_type == LENGTH_DELIMITED:
                length, position = data[position], position + 1
                if length >= 0x80:
                    length, position = _varint(data, position - 1)
            else:
                length = {_FIXED64: 8, _FIXED32: 4}[wire_type]
            value, position = data[position : position + length], position + length
            if position > len(data):
                raise IndexError("truncated message")
        yield number, wire_type, value


def varints(data: memoryview) -> Iterator[int]:
    """The values of a packed field of integers."""
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value
