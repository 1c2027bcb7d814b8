"""The quick way from a protobuf event to its row.

An event is parsed as a message of its own, whose free-form objects are the bytes that were sent.
These are read as JSON without a map and its values being made of them, which took most of the time.

An event that this way does not take is read by protobuf_codec, with care; what both take has the
same row, except for the order of the entries of an object, which PostgreSQL does not keep.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import orjson
from google.protobuf.message import DecodeError

from productgraph.v1.event_pb2 import Event
from server.events.copy_rows import QUOTED_EMPTY, Row, join_cells, new_row
from server.events.derived_messages import derive_message
from server.events.encoded_structs import UNREADABLE, NotPlain, keep_bytes, read_object
from server.events.schema import Field, Kind, Schema
from server.events.text_rules import TextRules
from server.events.timestamps import format_moment, truncate_timestamp


class QuickProtobufReader:
    """Turns encoded events into rows. With `keep_encoded`, a row has its event's protobuf too."""

    def __init__(self, schema: Schema, *, keep_encoded: bool) -> None:
        self._keep_encoded = keep_encoded
        self._max_bytes = schema.max_bytes
        self._max_depth = schema.max_depth
        self._parse: Callable[[bytes], Any] = derive_message(Event, "plain", keep_bytes).FromString
        texts, numbers = schema.of_kind(Kind.TEXT), schema.of_kind(Kind.INTEGER, Kind.LONG)
        self._texts, self._numbers = _get_all(texts), _get_all(numbers)
        self._objects = _get_all(schema.of_kind(Kind.OBJECT))
        # The time of the primary key comes last.
        times = sorted(schema.of_kind(Kind.TIMESTAMP), key=lambda f: f.name == "event_timestamp")
        self._times = [field.name for field in times]
        scalars = enumerate((*texts, *numbers))
        self._optional = [(place, f) for place, f in scalars if not f.rules.required]
        self._rules = TextRules(schema)
        self._ruled = itemgetter(*map(texts.index, self._rules.fields))
        self._event_id = [field.name for field in texts].index("event_id")

    def read(self, encoded: bytes, project_id: str) -> Row | None:
        """Return the row of an event that is plainly valid, or None."""
        if len(encoded) > self._max_bytes:
            return None
        try:
            return self._make_row(self._parse(encoded), encoded, project_id)
        except (*UNREADABLE, DecodeError):
            return None

    def _make_row(self, event: Any, encoded: bytes, project_id: str) -> Row | None:
        texts = self._texts(event)
        if not self._rules.are_plainly_kept(self._ruled(texts), project_id):
            return None
        cells = [*texts, *[str(number) if number else "" for number in self._numbers(event)]]
        zeros = encoded.count(0)
        for sent in self._objects(event):
            if sent:
                zeros -= sent[0].count(0)
                cells.append(self._write_object(sent))
            else:
                cells.append("")
        # A zero byte elsewhere is in a text, or stands for a field that is present and empty.
        if zeros:
            if "\0" in "".join(texts):
                return None
            for place, field in self._optional:
                if not cells[place] and event.HasField(field.name):
                    cells[place] = QUOTED_EMPTY if field.kind is Kind.TEXT else "0"
        for name in self._times:
            time = getattr(event, name)
            seconds, nanos = time.seconds, time.nanos
            if not seconds and not nanos:
                return None  # it may be absent
            cells.append(format_moment(seconds, nanos))
        identity = project_id, seconds * 1_000_000 + nanos // 1000, texts[self._event_id]
        line = join_cells(cells) + "\n"
        return new_row((identity, line, _cut_time(encoded, nanos) if self._keep_encoded else b""))

    def _write_object(self, sent: Sequence[bytes]) -> str:
        if len(sent) > 1:
            raise NotPlain
        written = orjson.dumps(read_object(sent[0], self._max_depth))
        if rb"\u0000" in written:
            raise NotPlain
        return written.decode()


def _get_all(fields: Sequence[Field]) -> Callable[[Any], tuple[Any, ...]]:
    return attrgetter(*(field.name for field in fields))


def _cut_time(encoded: bytes, nanos: int) -> bytes:
    """Return an event with its time as the table holds it."""
    if not nanos % 1000:
        return encoded
    event = Event.FromString(encoded)
    truncate_timestamp(event.event_timestamp)
    return event.SerializeToString()
