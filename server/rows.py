"""Events as rows of the table, in PostgreSQL's text format for COPY.

https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS
"""

from operator import itemgetter
from typing import NamedTuple

from google.protobuf.message import Message

from server.columns import ParsedEvent
from server.schema import Kind, Schema
from server.timestamps import format_timestamp

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
        self.columns = tuple(field.name for field in schema.fields)
        self._timestamps = tuple(field.name for field in schema.of_kind(Kind.TIMESTAMP))
        self._nulls = dict.fromkeys(self.columns, _NULL)
        self._in_order = itemgetter(*self.columns)

    def encode(self, parsed: ParsedEvent, encoded: bytes) -> Row:
        """The row of a valid event whose protobuf encoding is `encoded`."""
        event: Message = parsed.event
        names = parsed.columns["project_id"], parsed.columns["event_id"]
        columns = parsed.columns
        if _needs_escape("".join(columns.values())):
            columns = {name: _escape(text) for name, text in columns.items()}
        row = self._nulls | columns
        for name in self._timestamps:
            if event.HasField(name):
                row[name] = format_timestamp(getattr(event, name))
        key = "\0".join((names[0], row["event_timestamp"], names[1]))
        return Row(key, "\t".join(self._in_order(row)) + "\n", encoded)


def _needs_escape(text: str) -> bool:
    return "\\" in text or "\t" in text or "\n" in text or "\r" in text


def _escape(text: str) -> str:
    return text.translate(_ESCAPES) if _needs_escape(text) else text
