"""Events as rows of the table, in PostgreSQL's text format for COPY.

https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS
"""

from operator import attrgetter
from typing import Any, NamedTuple

import orjson
from google.protobuf.message import Message

from productgraph.v1.event_pb2 import Event
from server.schema import Field, Kind, Schema
from server.structs import TooDeep, read_struct
from server.timestamps import format_timestamp
from server.validation import InvalidEvent, describe_nesting

_NULL = r"\N"
_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


class Row(NamedTuple):
    """One event ready for COPY.

    `key` identifies the event, and sorts as the primary key does; `text` is its line; `encoded` is
    its protobuf.
    """

    key: str
    text: str
    encoded: bytes = b""

    @property
    def project_id(self) -> str:
        """The project of the event."""
        return self.key.partition("\0")[0]


class RowEncoder:
    """Encodes events as lines of COPY; `columns` names the table's columns in their order."""

    def __init__(self, schema: Schema) -> None:
        texts = schema.of_kind(Kind.TEXT)
        numbers = schema.of_kind(Kind.INTEGER, Kind.LONG)
        self._texts = attrgetter(*(field.name for field in texts))
        self._numbers = attrgetter(*(field.name for field in numbers))
        self._scalar_names = tuple(field.name for field in (*texts, *numbers))
        self._timestamps = tuple(field.name for field in schema.of_kind(Kind.TIMESTAMP))
        self._objects = schema.of_kind(Kind.OBJECT)
        self._max_depth = schema.max_depth
        self.columns = (
            *self._scalar_names,
            *self._timestamps,
            *(field.name for field in self._objects),
        )
        self._line = "\t".join(["%s"] * len(self.columns)) + "\n"

    def encode(self, event: Event, encoded: bytes) -> Row:
        """The row of a valid event whose protobuf encoding is `encoded`.

        Raises InvalidEvent where free-form fields nest too deep.
        """
        texts = self._texts(event)
        if _needs_escape("".join(texts)):
            texts = tuple(map(_escape, texts))
        scalars = (*texts, *self._numbers(event))
        # Only a field that is present and empty, or 0, puts a NUL byte behind its tag.
        if b"\0" in encoded:
            values = self._tell_empty_from_absent(event, scalars)
        else:
            values = [scalar or _NULL for scalar in scalars]
        instants = [self._encode_timestamp(event, name) for name in self._timestamps]
        values += instants
        values += [self._encode_object(event, field) for field in self._objects]
        key = f"{event.project_id}\0{instants[0]}\0{event.event_id}"
        return Row(key, self._line % tuple(values), encoded)

    def _tell_empty_from_absent(self, event: Message, scalars: tuple[Any, ...]) -> list[Any]:
        has = event.HasField
        named = zip(self._scalar_names, scalars, strict=True)
        return [scalar if scalar or has(name) else _NULL for name, scalar in named]

    @staticmethod
    def _encode_timestamp(event: Message, name: str) -> str:
        return format_timestamp(getattr(event, name)) if event.HasField(name) else _NULL

    def _encode_object(self, event: Message, field: Field) -> str:
        if not event.HasField(field.name):
            return _NULL
        try:
            content = read_struct(getattr(event, field.name), self._max_depth)
        except TooDeep:
            problem = describe_nesting(self._max_depth)
            raise InvalidEvent(f"{field.wire_name}: {problem}") from None
        return _escape(orjson.dumps(content).decode())


def _needs_escape(text: str) -> bool:
    return "\\" in text or "\t" in text or "\n" in text or "\r" in text


def _escape(text: str) -> str:
    return text.translate(_ESCAPES) if _needs_escape(text) else text
