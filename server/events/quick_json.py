"""The quick way from a parsed JSON event to its row.

The events of an SDK have the same names in the same order. What follows from the names alone is
worked out once for each such sequence, as a Layout, and what is left to do for an event is a dozen
calls in C. The figures beside them are instructions for an event of 17 fields: 63,000 in all, after
the 18,000 that orjson takes.

An event that this way does not take is read by json_codec, with care; what both take has the same
row.
"""

from collections.abc import Mapping, Sequence
from itertools import compress
from operator import itemgetter
from typing import Any

import orjson

from productgraph.v1 import rules_pb2
from productgraph.v1.event_pb2 import Event
from server.events.copy_rows import QUOTED_EMPTY, SPECIAL, Row, join_cells, new_row
from server.events.free_form import are_plain, fill_struct
from server.events.schema import Field, Kind, Schema
from server.events.text_rules import TextRules
from server.events.timestamps import read_moment

# Layouts that are kept, none of more names or characters than an SDK sends: a client may send other
# names in every event.
_MAX_LAYOUTS, _MAX_NAMES, _MAX_CHARACTERS = 1000, 100, 4000
# A body with more escapes is taken to have all kinds of them.
_MAX_ESCAPES = 10_000
# From here on a float may have been an integer of other digits.
_EXACT = 2.0**53


def find_special(body: bytes) -> str:
    """Return the characters that COPY wants quoted and that may be in a text of a body.

    JSON has them only escaped.
    """
    if b"\\" not in body:
        return ""
    # Cut at its backslashes: to search for each escape took 5,500 instructions an event.
    parts = body.split(b"\\", _MAX_ESCAPES)
    escapes = {part[:1] for part in parts[1:]}
    if len(parts) > _MAX_ESCAPES or (b"u" in escapes and rb"\u000" in body):
        return SPECIAL
    return "".join(compress("\t\n\r", map(escapes.__contains__, (b"t", b"n", b"r"))))


class Layout:
    """Where the fields of an event are among its values, for one sequence of names.

    Behind the values stand "", for what is absent, and the JSON of the unnamed fields.
    """

    __slots__ = (
        *("arguments", "cells", "integers", "nulls", "objects", "optional_texts", "ruled"),
        *("scalars", "times", "unnamed"),
    )

    def __init__(
        self, names: Sequence[str], schema: Schema, ruled: Sequence[Field], columns: Sequence[str]
    ) -> None:
        named = {field.wire_name: field for field in schema.fields}
        place = {named[name].name: i for i, name in enumerate(names) if name in named}
        absent = len(names)

        def find(*kinds: Kind) -> list[Field]:
            return [field for field in schema.of_kind(*kinds) if field.name in place]

        scalars = find(Kind.TEXT, Kind.INTEGER, Kind.LONG)
        self.arguments = [field.name for field in scalars]
        self.scalars = itemgetter(*(place[field.name] for field in scalars))
        # The time of the primary key comes last.
        times = sorted(find(Kind.TIMESTAMP), key=lambda field: field.name == "event_timestamp")
        self.times = [(place[field.name], field.name) for field in times]
        self.integers = [
            (place[field.name], field.name, field.rules.rounding == rules_pb2.ROUNDING_NEAREST)
            for field in find(Kind.INTEGER, Kind.LONG)
        ]
        self.objects = [place[field.name] for field in find(Kind.OBJECT)]
        texts = find(Kind.TEXT)
        self.optional_texts = [place[field.name] for field in texts if not field.rules.required]
        self.unnamed = [(name, i) for i, name in enumerate(names) if name not in named]
        if self.unnamed:
            place[schema.catch_all.name] = absent + 1
        self.ruled = itemgetter(*(place.get(field.name, absent) for field in ruled))
        self.cells = itemgetter(*(place.get(name, absent) for name in columns))
        # The places where an event had null: others of the same SDK have it there too.
        self.nulls: list[int] = []

    def learn_nulls(self, item: Mapping[str, Any]) -> bool:
        """Remember the places of an event's nulls. Return True if one of them is new."""
        nulls = {place for place, value in enumerate(item.values()) if value is None}
        is_new = not nulls.issubset(self.nulls)
        self.nulls = sorted(nulls.union(self.nulls))
        return is_new

    def collect_unnamed(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the fields of an event that the schema does not name."""
        return {name: values[i] for name, i in self.unnamed if values[i] is not None}


class _NotPlain(Exception):
    """The careful way must look at an event."""


class QuickReader:
    """Turns parsed events into rows; `columns` names the table's columns in their order.

    With `keep_encoded`, a row has the protobuf of its event too.
    """

    def __init__(self, schema: Schema, columns: Sequence[str], *, keep_encoded: bool) -> None:
        self._schema = schema
        self._columns = columns
        self._keep_encoded = keep_encoded
        self._required = {field.wire_name for field in schema.fields if field.rules.required}
        self._rules = TextRules(schema)
        self._event_id = [field.name for field in self._rules.fields].index("event_id")
        self._objects = schema.of_kind(Kind.OBJECT)
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def read(self, item: Any, project_id: str, special: str) -> Row | None:
        """Return the row of an event that is plainly valid, however large, or None."""
        if type(item) is not dict:
            return None
        names = tuple(item)
        layout = self._layouts.get(names) or self._add_layout(names)  # 4,400
        if layout is None:
            return None
        try:
            return self._make_row(layout, item, project_id, special)
        except (_NotPlain, TypeError, ValueError):
            # A null where no event had one before is a TypeError: the next ones pass.
            return self.read(item, project_id, special) if layout.learn_nulls(item) else None

    def _make_row(
        self, layout: Layout, item: Mapping[str, Any], project_id: str, special: str
    ) -> Row | None:
        values = [*item.values()]
        has_empty = "" in values
        values.append("")
        arguments = dict(zip(layout.arguments, layout.scalars(values), strict=True))  # 13,300
        for place, name, may_round in layout.integers:
            if (number := values[place]) is not None:
                if type(number) is not int:
                    arguments[name] = number = _round(number, may_round)
                values[place] = str(number)
        event = Event(**arguments)  # 11,500: checks the kinds; None is absent
        for place, name in layout.times:
            seconds, nanos, values[place] = read_moment(values[place])  # 4,800
            time = getattr(event, name)
            time.seconds, time.nanos = seconds, nanos  # 3,600
        for place in layout.objects:
            if values[place] is not None:
                values[place] = self._write_object(values[place])  # 8,000
        if layout.unnamed:
            unnamed = layout.collect_unnamed(values)
            values.append(self._write_object(unnamed) if unnamed else "")
        if has_empty:
            for place in layout.optional_texts:
                if values[place] == "":
                    values[place] = QUOTED_EMPTY
        for place in layout.nulls:
            if values[place] is None:
                values[place] = ""
        texts = layout.ruled(values)
        if not self._rules.are_plainly_kept(texts, project_id):
            return None
        cells = layout.cells(values)  # 5,600
        line = join_cells(cells, special) if special else "\t".join(cells)  # 3,700
        identity = project_id, seconds * 1_000_000 + nanos // 1000, texts[self._event_id]
        encoded = self._encode(event, layout, item) if self._keep_encoded else b""
        return new_row((identity, line + "\n", encoded))

    def _add_layout(self, names: tuple[str, ...]) -> Layout | None:
        if not self._required.issubset(names) or len(names) > _MAX_NAMES:
            return None
        if sum(map(len, names)) > _MAX_CHARACTERS:
            return None
        layout = Layout(names, self._schema, self._rules.fields, self._columns)
        if layout.unnamed and self._schema.catch_all.wire_name in names:
            return None
        if len(self._layouts) >= _MAX_LAYOUTS:
            self._layouts.clear()
        self._layouts[names] = layout
        return layout

    def _write_object(self, value: Any) -> str:
        if type(value) is not dict:
            raise _NotPlain
        encoded = orjson.dumps(value)
        # The length first: it tells at once what would take long to look through.
        if len(encoded) > self._schema.max_bytes:
            raise _NotPlain
        if not are_plain(value.values(), self._schema.max_depth):
            raise _NotPlain
        return encoded.decode()

    def _encode(self, event: Event, layout: Layout, item: Mapping[str, Any]) -> bytes:
        for field in self._objects:
            if item.get(field.wire_name) is not None:
                fill_struct(getattr(event, field.name), item[field.wire_name])
        if unnamed := layout.collect_unnamed([*item.values()]):
            fill_struct(getattr(event, self._schema.catch_all.name), unnamed)
        return event.SerializeToString()


def _round(number: Any, may_round: bool) -> int:
    """Return a float as an integer, rounded half away from zero if it may be."""
    if type(number) is not float or abs(number) >= _EXACT:
        raise _NotPlain
    whole = int(number)
    if whole != number and not may_round:
        raise _NotPlain
    return whole + int(2 * (number - whole))  # the difference is exact: half or more is 1
