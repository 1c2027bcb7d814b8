"""What an event says for each column of the table, as text, before it is quoted for COPY."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import orjson
from google.protobuf.message import Message

from productgraph.v1.event_pb2 import Event
from server.events.free_form import TooDeep, read_struct
from server.events.problems import Problem, report_nesting
from server.events.schema import Kind, Schema

# Where most NUL bytes are found, in free-form fields: zeros behind a double's tag, and `false`, by
# a tag that no field of an event has.
_DOUBLE, _FALSE = re.compile(rb"\x11\0+"), b"\x20\0"


@dataclass(frozen=True)
class MalformedEvent:
    """What could be read of an event before a field whose value is unreadable.

    `position` is that field's place in the schema; 0 if the whole cannot be read, with an empty
    `event`. `unnamed` are the fields that the schema does not name.
    """

    event: Event
    position: int
    problem: Problem
    unnamed: Sequence[str] = ()


class ParsedEvent(NamedTuple):
    """An event as its codec has read it, of no more bytes than it may have.

    `columns` has the texts of its scalars and objects, as `Schema.columns` orders them: "" for what
    is absent, and for the texts named in `empty`, which are present.
    """

    event: Event
    columns: Sequence[str]
    empty: Sequence[str] = ()


class ColumnReader:
    """Reads columns off events of one schema."""

    def __init__(self, schema: Schema) -> None:
        texts = schema.of_kind(Kind.TEXT)
        numbers = schema.of_kind(Kind.INTEGER, Kind.LONG)
        self._texts = attrgetter(*(field.name for field in texts))
        self._numbers = attrgetter(*(field.name for field in numbers))
        self._optional_texts = tuple(field.name for field in texts if not field.rules.required)
        self._number_names = tuple(field.name for field in numbers)
        self._objects = schema.of_kind(Kind.OBJECT)
        self._max_depth = schema.max_depth

    def read(self, event: Event, encoded: bytes) -> ParsedEvent | MalformedEvent:
        """Return the event with its columns; malformed if its free-form fields nest too deep.

        `encoded` is any encoding of the event.
        """
        objects = []
        for field in self._objects:
            try:
                objects.append(self._read_object(event, field.name))
            except TooDeep:
                problem = Problem(field.wire_name, *report_nesting(self._max_depth))
                return MalformedEvent(event, field.position, problem)
        numbers = [str(number) if number else "" for number in self._numbers(event)]
        empty: Sequence[str] = ()
        if _may_hold_empty(encoded):
            numbers = [self._read_number(event, name) for name in self._number_names]
            empty = [name for name in self._optional_texts if _is_empty(event, name)]
        columns = (*self._texts(event), *numbers, *objects)
        return ParsedEvent(event, columns, empty)

    def _read_object(self, event: Message, name: str) -> str:
        if not event.HasField(name):
            return ""
        return orjson.dumps(read_struct(getattr(event, name), self._max_depth)).decode()

    def _read_number(self, event: Message, name: str) -> str:
        return str(getattr(event, name)) if event.HasField(name) else ""


def _may_hold_empty(encoded: bytes) -> bool:
    """Tell whether a field may be present and empty, or 0, with a NUL byte behind its tag."""
    first = encoded.find(b"\0")
    if first < 0:
        return False
    found = encoded[max(0, first - 1) : encoded.rfind(b"\0") + 1]
    return b"\0" in _DOUBLE.sub(b"", found.replace(_FALSE, b""))


def _is_empty(event: Message, name: str) -> bool:
    return event.HasField(name) and not getattr(event, name)
