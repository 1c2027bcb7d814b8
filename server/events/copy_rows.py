"""Events as rows of the table, in the CSV that COPY reads.

https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS
"""

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import NamedTuple

from google.protobuf.message import Message

from server.events.parsed import ParsedEvent
from server.events.schema import Kind, Schema
from server.events.timestamps import count_microseconds, format_timestamp

# Of its formats the one in which most lines are their texts, joined: what is absent takes no
# character, and next to no text holds a tab or what quotes here.
COPY_OPTIONS = r"FORMAT csv, DELIMITER E'\t', QUOTE E'\x01', NULL ''"
_QUOTE = "\x01"
# The cell of a text that is present and empty; known by its identity, for a text may be like it.
QUOTED_EMPTY = 2 * _QUOTE


# Project, microseconds since 1970 and event id: the primary key, which sorts as this does.
Identity = tuple[str, int, str]


class Row(NamedTuple):
    """One event ready for COPY.

    `text` is its line; `encoded` is its protobuf, empty unless it is to be forwarded.
    """

    identity: Identity
    text: str
    encoded: bytes = b""

    @property
    def project_id(self) -> str:
        """Return the project of the event."""
        return self.identity[0]


# Makes a row of a tuple, in C.
new_row = partial(tuple.__new__, Row)


class RowEncoder:
    """Encodes events as lines of COPY; `columns` names the table's columns in their order."""

    def __init__(self, schema: Schema) -> None:
        names = [field.name for field in schema.columns]
        self._position_of = {name: position for position, name in enumerate(names)}
        self._timestamps = tuple(field.name for field in schema.of_kind(Kind.TIMESTAMP))
        self._ids = itemgetter(names.index("project_id"), names.index("event_id"))
        self.columns = (*names, *self._timestamps)

    def encode(self, parsed: ParsedEvent) -> Row:
        """Return the row of a valid event, without its protobuf."""
        event = parsed.event
        times = [_format_time(event, name) for name in self._timestamps]
        project_id, event_id = self._ids(parsed.columns)
        identity = project_id, count_microseconds(event.event_timestamp), event_id
        line = "\t".join((*parsed.columns, *times))
        if parsed.empty or self._needs_quotes(line):
            line = "\t".join((*self._quote(parsed), *times))
        return Row(identity, line + "\n")

    def _needs_quotes(self, line: str) -> bool:
        has_more = line.count("\t") >= len(self.columns)
        return has_more or "\n" in line or "\r" in line or _QUOTE in line

    def _quote(self, parsed: ParsedEvent) -> list[str]:
        texts = [_quote(text) if _is_special(text) else text for text in parsed.columns]
        for name in parsed.empty:
            texts[self._position_of[name]] = _quote("")
        return texts


def _format_time(event: Message, name: str) -> str:
    return format_timestamp(getattr(event, name)) if event.HasField(name) else ""


def _is_special(text: str) -> bool:
    return "\t" in text or "\n" in text or "\r" in text or _QUOTE in text


def _quote(text: str) -> str:
    return _QUOTE + text.replace(_QUOTE, 2 * _QUOTE) + _QUOTE


def join_quoted(cells: Sequence[str], special: str) -> str:
    """Join the cells of a row into a line without its end, the texts that need it quoted.

    `special` has the characters that need quotes and may be in a text.
    """
    line = "\t".join(cells)
    if _QUOTE in special or ("\t" in special and line.count("\t") >= len(cells)):
        return "\t".join(map(_quote_special, cells))
    for character in special.lstrip("\t"):
        end = 0
        while (position := line.find(character, end)) >= 0:
            start = line.rfind("\t", 0, position) + 1
            end = line.find("\t", position)
            end = len(line) if end < 0 else end
            if line[start] != _QUOTE:  # as another character may have had it quoted
                line = f"{line[:start]}{_QUOTE}{line[start:end]}{_QUOTE}{line[end:]}"
                end += 2
    return line


def _quote_special(cell: str) -> str:
    return _quote(cell) if cell is not QUOTED_EMPTY and _is_special(cell) else cell
