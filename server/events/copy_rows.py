"""Events as rows of the table, in the CSV that COPY reads.

https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS
"""

import csv
from collections.abc import Sequence
from functools import partial
from io import StringIO
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
# The characters for which COPY wants a text quoted.
SPECIAL = f"\t\n\r{_QUOTE}"
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
        cells = [*parsed.columns, *(_format_time(event, name) for name in self._timestamps)]
        for name in parsed.empty:
            cells[self._position_of[name]] = QUOTED_EMPTY
        project_id, event_id = self._ids(parsed.columns)
        identity = project_id, count_microseconds(event.event_timestamp), event_id
        return Row(identity, join_cells(cells) + "\n")


def _format_time(event: Message, name: str) -> str:
    return format_timestamp(getattr(event, name)) if event.HasField(name) else ""


def join_cells(cells: Sequence[str], special: str = SPECIAL) -> str:
    """Join the cells of a row into a line without its end, the texts that need it quoted.

    `special` has those of the special characters that may be in a text.
    """
    line = "\t".join(cells)
    if _QUOTE in line or ("\t" in special and line.count("\t") >= len(cells)):
        return "\t".join(map(_quote_special, cells))
    for character in special:
        if character not in "\n\r":
            continue
        end = 0
        while (position := line.find(character, end)) >= 0:
            start = line.rfind("\t", 0, position) + 1
            end = line.find("\t", position)
            end = len(line) if end < 0 else end
            if line[start] != _QUOTE:  # as another character may have had it quoted
                line = f"{line[:start]}{_QUOTE}{line[start:end]}{_QUOTE}{line[end:]}"
                end += 2
    return line


def split_cells(line: str) -> list[str]:
    """Return the texts of a line's cells, as they were before they were quoted."""
    if _QUOTE not in line:
        return line[:-1].split("\t")
    return next(csv.reader(StringIO(line, newline=""), delimiter="\t", quotechar=_QUOTE))


def _quote_special(cell: str) -> str:
    if cell is QUOTED_EMPTY or not any(map(cell.__contains__, SPECIAL)):
        return cell
    return f"{_QUOTE}{cell.replace(_QUOTE, 2 * _QUOTE)}{_QUOTE}"
