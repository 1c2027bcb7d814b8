"""What an event says for each column of the table, as text, before it is escaped for COPY."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import orjson
from google.protobuf.message import Message

from productgraph.v1.event_pb2 import Event
from server.schema import Field, Kind, Schema
from server.structs import TooDeep, read_struct
from server.validation import MalformedEvent, describe_nesting

# A double's tag and the zeros that follow it: in free-form fields, where most NUL bytes are found.
_DOUBLE = re.compile(rb"\x11\0+")


class ParsedEvent(NamedTuple):
    """An event as an edge has read it.

    `columns` has the texts of the scalars and objects that are present, by their columns' names.
    """

    event: Event
    columns: dict[str, str]


@dataclass(frozen=True, slots=True)
class ParsedBatch:
    """The events of one request in order, each parsed when it is asked for.

    `received` gives the bytes of one that was, by its index, in the form of `protocol`.
    """

    protocol: str
    events: Iterator[ParsedEvent | MalformedEvent]
    received: Callable[[int], bytes]

    def __iter__(self) -> Iterator[ParsedEvent | MalformedEvent]:
        return self.events


class ColumnReader:
    """Reads columns off events of one schema."""

    def __init__(self, schema: Schema) -> None:
        scalars = schema.of_kind(Kind.TEXT, Kind.INTEGER, Kind.LONG)
        self._names = tuple(field.name for field in scalars)
        self._values = attrgetter(*self._names)
        self._optional = tuple(field.name for field in scalars if not field.rules.required)
        self._numbers = tuple(field.name for field in scalars if field.kind is not Kind.TEXT)
        self._objects = schema.of_kind(Kind.OBJECT)
        self._max_depth = schema.max_depth

    def read(self, event: Event, encoded: bytes) -> ParsedEvent | MalformedEvent:
        """The event with its columns; malformed where free-form fields nest too deep.

        `encoded` is any encoding of the event.
        """
        named = zip(self._names, self._values(event), strict=True)
        columns = {name: value for name, value in named if value}
        if _may_hold_empty(encoded):
            absent = (name for name in self._optional if name not in columns)
            columns |= {name: getattr(event, name) for name in absent if _has_field(event, name)}
        for name in self._numbers:
            if name in columns:
                columns[name] = str(columns[name])
        return self.complete(event, columns)

    def complete(self, event: Event, columns: dict[str, str]) -> ParsedEvent | MalformedEvent:
        """The event with columns that lack some objects; malformed as `read` says."""
        for field in self._objects:
            if field.name not in columns and _has_field(event, field.name):
                try:
                    columns[field.name] = self._read_object(event, field)
                except TooDeep:
                    problem = f"{field.wire_name}: {describe_nesting(self._max_depth)}"
                    return MalformedEvent(event, field.position, problem)
        return ParsedEvent(event, columns)

    def _read_object(self, event: Message, field: Field) -> str:
        return orjson.dumps(read_struct(getattr(event, field.name), self._max_depth)).decode()


def _has_field(event: Message, name: str) -> bool:
    return event.HasField(name)


def _may_hold_empty(encoded: bytes) -> bool:
    """Whether a field may be present and empty, or 0: that puts a NUL byte behind its tag."""
    return b"\0" in encoded and b"\0" in _DOUBLE.sub(b"", encoded)
