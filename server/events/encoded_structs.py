"""Free-form objects, read off the bytes of a google.protobuf.Struct.

Reading them through the maps and values of protobuf takes longer.
"""

import struct
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from server.events.free_form import read_number

# The tags of the fields of Struct, its entries, ListValue and Value.
_ENTRY, _KEY, _VALUE, _ELEMENT = 0x0A, 0x0A, 0x12, 0x0A
_NUMBER, _TEXT, _OBJECT, _LIST = 0x11, 0x1A, 0x2A, 0x32
_SIMPLE_VALUES = {b"\x08\x00": None, b"\x20\x00": False, b"\x20\x01": True}
_DOUBLE = struct.Struct("<xd")


class NotPlain(Exception):
    """The careful way must look at an object."""


# What reading may raise: each stands for bytes that protobuf itself has to read.
UNREADABLE = (NotPlain, IndexError, ValueError, struct.error)


def keep_bytes(field: FieldDescriptorProto) -> None:
    """Make an object the bytes that are sent for it; several if it is sent in parts."""
    if field.type_name == ".google.protobuf.Struct":
        field.type = field.TYPE_BYTES
        field.label = field.LABEL_REPEATED
        field.ClearField("type_name")


def read_object(data: bytes, depth: int) -> dict[str, Any]:
    """Return the object that a Struct holds, of at most `depth` levels."""
    if not depth:
        raise NotPlain
    found: dict[str, Any] = {}
    for entry in _split(data, _ENTRY):
        size, start = (entry[1], 2) if entry[1] < 128 else _read_size(entry, 1)
        end = start + size
        if entry[0] != _KEY or entry[end] != _VALUE:
            raise NotPlain
        found[entry[start:end].decode()] = _read_value(_read_rest(entry, end + 1), depth)
    return found


def _read_value(data: bytes, depth: int) -> Any:
    kind = data[0]
    if kind == _TEXT:
        return _read_rest(data, 1).decode()
    if kind == _NUMBER:
        return read_number(*_DOUBLE.unpack(data))
    if data in _SIMPLE_VALUES:
        return _SIMPLE_VALUES[data]
    if kind == _OBJECT:
        return read_object(_read_rest(data, 1), depth - 1)
    if kind == _LIST and depth > 1:
        parts = _split(_read_rest(data, 1), _ELEMENT)
        return [_read_value(part, depth - 1) for part in parts]
    raise NotPlain


def _split(data: bytes, tag: int) -> list[bytes]:
    """Return the fields of a message that has no others than of one tag, each behind its size."""
    parts = []
    at, end = 0, len(data)
    while at < end:
        if data[at] != tag:
            raise NotPlain
        size, start = (data[at + 1], at + 2) if data[at + 1] < 128 else _read_size(data, at + 1)
        at = start + size
        parts.append(data[start:at])
    if at > end:
        raise NotPlain
    return parts


def _read_rest(data: bytes, at: int) -> bytes:
    """Return what follows a size, and must be as large."""
    size, start = (data[at], at + 1) if data[at] < 128 else _read_size(data, at)
    if start + size != len(data):
        raise NotPlain
    return data[start:]


def _read_size(data: bytes, at: int) -> tuple[int, int]:
    """Return a size of more than one byte, and the position after it."""
    size = data[at] & 127 | (data[at + 1] & 127) << 7
    if data[at + 1] < 128:
        return size, at + 2
    if data[at + 2] > 127:
        raise NotPlain  # larger than any event
    return size | data[at + 2] << 14, at + 3
