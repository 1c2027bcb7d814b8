"""What an event says for each column of the table, as text, before it is quoted for COPY."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import orjson
from google.protobuf.message import Message

from productgraph.v1.event_pb2 import Event
from server.events.free_form import TooDeep, fill_struct, read_struct
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
    """An event as its codec has read it.

    `columns` has the texts of its scalars and objects, as `Schema.columns` orders them: "" for what
    is absent, and for the texts named in `empty`, which are present. `objects` are those that the
    event does not have yet, as most of them are never needed there. `size` counts its bytes as it
    was sent; if it is None, they are no more than its columns allow for.
    """

    event: Event
    columns: Sequence[str]
    empty: Sequence[str] = ()
    objects: Mapping[str, dict[str, Any]] = {}
    size: int | None = None

    def complete(self) -> Event:
        """Return the event with all of its objects."""
        for name, value in self.objects.items():
            fill_struct(getattr(self.event, name), value)
        return self.event


class ColumnReader:
    """Reads columns off events of one schema."""

    def __init__(self, schema: Schema) -> None:
        texts = schema.of_kind(Kind.TEXT)
        numbers = schema.of_kind(Kind.INTEGER, Kind.LONG)
        self._absent = {field.name: "" for field in schema.columns}
        self._in_order = itemgetter(*self._absent)
        self._texts = attrgetter(*(field.name for field in texts))
        self._numbers = attrgetter(*(field.name for field in numbers))
        self._optional_texts = tuple(field.name for field in texts if not field.rules.required)
        self._number_names = tuple(field.name for field in numbers)
        self._objects = schema.of_kind(Kind.OBJECT)
        self._max_depth = schema.max_depth

    def arrange(
        self, event: Event, texts: dict[str, str], objects: Mapping[str, dict[str, Any]]
    ) -> ParsedEvent:
        """Return the event with these texts, by their columns' names, and objects that it lacks."""
        empty = [name for name in texts if not texts[name]] if "" in texts.values() else ()
        return ParsedEvent(event, self._in_order(self._absent | texts), empty, objects)

    def read(self, event: Event, encoded: bytes) -> ParsedEvent | MalformedEvent:
        """Return the event with its columns; malformed if its free-form fields nest too deep.

        `encoded` is any encoding of the event, which gives its size.
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
        return ParsedEvent(event, columns, empty, size=len(encoded))

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
