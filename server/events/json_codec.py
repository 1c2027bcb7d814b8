"""JSON bytes to Events, by the documented field names, and results back to JSON.

Most events are built by a few calls in C. Whatever these refuse is read again with care: to name
the first field that is wrong, or to accept what only looked wrong.
"""

import re
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from functools import cached_property
from typing import Any

import orjson
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from productgraph.v1.event_pb2 import Event
from server.deadline import NEVER, Deadline
from server.errors import InvalidArgument
from server.events.batch import ParsedBatch, ReadEvent
from server.events.free_form import LostDigits, fill_struct, has_more_values, is_plain
from server.events.json_parser import (
    count_values,
    encode_document,
    estimate_seconds,
    parse_document,
    parse_exactly,
)
from server.events.parsed import ColumnReader, ParsedEvent
from server.events.problems import (
    NOT_A_STRING,
    NOT_A_TIMESTAMP,
    NOT_AN_EVENT,
    NOT_AN_INTEGER,
    NOT_AN_OBJECT,
    Fault,
    InvalidValue,
    Problem,
    Reason,
    report_excess,
)
from server.events.quick_json import QuickReader, Traits
from server.events.schema import MAX_BATCH_SIZE, Field, Kind, Schema
from server.events.timestamps import parse_timestamp
from server.events.validation import MalformedEvent
from server.protocols import HTTP

# A number as JSON writes it, no longer than any double is written.
_NUMBER = re.compile(r"-?\d{1,40}(\.\d{1,40})?([eE][+-]?\d{1,3})?", re.ASCII)
# How orjson writes a float that may have been an integer with more digits.
_LONG_NUMBER = re.compile(rb"\de\+(1[89]|[2-9]\d|\d{3})")


class JsonCodec:
    """Reads batches of events by one schema, with `quick` most of them in one go."""

    def __init__(self, schema: Schema, quick: QuickReader | None = None) -> None:
        self._quick = quick
        self._fields = schema.fields
        self._name_of = {field.wire_name: field.name for field in schema.fields}.get
        self._timestamps = [field.name for field in schema.of_kind(Kind.TIMESTAMP)]
        self._objects = [field.name for field in schema.of_kind(Kind.OBJECT)]
        integers = schema.of_kind(Kind.INTEGER, Kind.LONG)
        self._integers = {field.name: field for field in integers}
        self._catch_all = schema.catch_all
        self._columns = ColumnReader(schema)
        self._max_depth = schema.max_depth
        self._max_bytes = schema.max_bytes
        # In protobuf, a value within another takes four bytes at least.
        self._max_values = schema.max_bytes // 4

    def parse_batch(
        self, body: bytes, deadline: Deadline = NEVER, project_id: str | None = None
    ) -> ParsedBatch:
        """Return the events of a request's body in order, each parsed when it is asked for.

        So one event at a time is in memory, and in the processor's cache, beside the document.
        An event that is plainly valid for the project comes as its row, if a project is given.
        Raises InvalidArgument if the body is not JSON, not of the documented shape, or holds too
        many events, and Unavailable if it takes longer to read than is left.
        """
        deadline.check(estimate_seconds(body, deadline.left()))
        items = _Items(body, self._max_bytes, deadline)
        count, events = len(items.quick), self._parse_items(items)
        if self._quick is not None and project_id is not None:
            events = self._parse_quickly(self._quick, items, project_id, Traits.of(body))
        return ParsedBatch(HTTP, count, len(body), events, items.encode)

    def _parse_quickly(
        self, quick: QuickReader, items: "_Items", project_id: str, traits: Traits
    ) -> Iterator[ReadEvent]:
        for index, item in enumerate(items.quick):
            row = quick.read(item, project_id, traits)
            yield row if row is not None else self._parse_item(items, index)

    def _parse_items(self, items: "_Items") -> Iterator[ReadEvent]:
        return (self._parse_item(items, index) for index in range(len(items.quick)))

    def _parse_item(self, items: "_Items", index: int) -> ParsedEvent | MalformedEvent:
        parse = self._parse_dear_event if items.values > self._max_values else self._parse_event
        try:
            return parse(items.quick[index])
        except LostDigits:
            return self._parse_event(items.exact[index])

    def _parse_dear_event(self, item: Any) -> ParsedEvent | MalformedEvent:
        """Look only at an event's texts and numbers if it has more values than allowed."""
        if type(item) is not dict or not has_more_values(item, self._max_values):
            return self._parse_event(item)
        fields = self._collect_fields(item)
        for name in self._objects:
            fields.pop(name, None)
        parsed = self._parse_carefully(fields)
        if isinstance(parsed, MalformedEvent):
            return parsed
        return MalformedEvent(parsed.event, len(self._fields), report_excess(self._max_bytes))

    def _parse_event(self, item: Any) -> ParsedEvent | MalformedEvent:
        if type(item) is not dict:
            return MalformedEvent(Event(), 0, NOT_AN_EVENT)
        try:
            return self._build_event(self._collect_fields(item))
        except LostDigits:
            raise
        except Exception:  # noqa: BLE001 - whatever it was, the careful reading asks for types
            return self._parse_carefully(self._collect_fields(item))

    def _collect_fields(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the fields present, by proto name, and in one those that the schema lacks."""
        name_of = self._name_of
        fields = {name_of(name, ""): value for name, value in item.items() if value is not None}
        if "" in fields or type(fields.get(self._catch_all.name, fields)) is not dict:
            fields.pop("", None)
            self._merge_unnamed(fields, item)
        return fields

    def _merge_unnamed(self, fields: dict[str, Any], item: dict[str, Any]) -> None:
        unnamed = {
            name: value
            for name, value in item.items()
            if value is not None and not self._name_of(name)
        }
        sent = fields.get(self._catch_all.name, {})
        is_object = type(sent) is dict
        merged = sent | unnamed if is_object else unnamed | {self._catch_all.wire_name: sent}
        fields[self._catch_all.name] = merged

    def _build_event(self, fields: dict[str, Any]) -> ParsedEvent | MalformedEvent:
        """Build an event of values of the right types; any others raise whatever they raise."""
        times = [(name, fields.pop(name)) for name in self._timestamps if name in fields]
        objects = {name: fields.pop(name) for name in self._objects if name in fields}
        integers = [name for name in self._integers if name in fields]
        for name in integers:
            if type(fields[name]) is float:
                fields[name] = _read_integer(fields[name], self._integers[name])
        event = Event(**fields)
        for name, time in times:
            _set_timestamp(getattr(event, name), time)
        for name, value in objects.items():
            if type(value) is not dict or not is_plain(value, self._max_depth):
                return self._read_back(event, objects)
            fields[name] = orjson.dumps(value).decode()
        # The event has taken the rest, so it is what the columns hold, once integers are texts.
        for name in integers:
            fields[name] = str(fields[name])
        return self._columns.arrange(event, fields, objects)

    def _read_back(self, event: Event, objects: dict[str, Any]) -> ParsedEvent | MalformedEvent:
        """Replace its objects by what the event makes of them."""
        for name, value in objects.items():
            self._set_object(getattr(event, name), value)
        return self._columns.read(event, event.SerializeToString())

    def _parse_carefully(self, fields: dict[str, Any]) -> ParsedEvent | MalformedEvent:
        """Set the fields in the order of the schema, up to the first that is malformed."""
        event = Event()
        for field in self._fields:
            if field.name not in fields:
                continue
            try:
                self._set_field(event, field, fields[field.name])
            except InvalidValue as error:
                problem = Problem(field.wire_name, *error.fault)
                return MalformedEvent(event, field.position, problem)
        return self._columns.read(event, event.SerializeToString())

    def _set_field(self, event: Event, field: Field, value: Any) -> None:
        if field.kind is Kind.TEXT:
            if type(value) is not str:
                raise InvalidValue(NOT_A_STRING)
            setattr(event, field.name, value)
        elif field.kind is Kind.TIMESTAMP:
            _set_timestamp(getattr(event, field.name), value)
        elif field.kind is Kind.OBJECT:
            self._set_object(getattr(event, field.name), value)
        else:
            setattr(event, field.name, _read_integer(value, field))

    def _set_object(self, target: Struct, value: Any) -> None:
        if type(value) is not dict:
            raise InvalidValue(NOT_AN_OBJECT)
        # One level more than allowed, for the column to be found too deep.
        fill_struct(target, value, self._max_depth + 1)


class _Items:
    """The events of a body as values, by the quick parser and, where it is needed, the exact."""

    def __init__(self, body: bytes, max_bytes: int, deadline: Deadline) -> None:
        self._body = body
        self._deadline = deadline
        self._max_bytes = max_bytes
        self.quick = _read_items(parse_document(body, deadline))

    @cached_property
    def values(self) -> int:
        """Return how many values the body has at most."""
        return count_values(self._body)

    @cached_property
    def exact(self) -> list[Any]:
        return _read_items(parse_exactly(self._body, self._deadline))

    def encode(self, index: int) -> bytes:
        """Return one event's JSON, with all digits that it had unless it is too large."""
        encoded = encode_document(self.quick[index])
        if len(encoded) > self._max_bytes or not _LONG_NUMBER.search(encoded):
            return encoded
        return encode_document(self.exact[index])


def _read_items(document: Any) -> list[Any]:
    if type(document) is not dict:
        raise InvalidArgument("body: must be an object")
    items = document.get("events")
    if type(items) is not list:
        raise InvalidArgument("events: must be an array")
    if len(items) > MAX_BATCH_SIZE:
        raise InvalidArgument(f"events: more than {MAX_BATCH_SIZE} in one batch")
    return items


def _set_timestamp(target: Timestamp, value: Any) -> None:
    if value == "":
        return
    if type(value) is not str:  # a list or an object need not be refused by what follows
        raise InvalidValue(NOT_A_TIMESTAMP)
    try:
        target.seconds, target.nanos = parse_timestamp(value)
    except ValueError:
        raise InvalidValue(NOT_A_TIMESTAMP) from None


def _read_integer(value: Any, field: Field) -> int:
    """Return an integer as proto3's JSON mapping has it, rounded if the field's rules say so."""
    is_number = isinstance(value, str | int | float | Decimal) and type(value) is not bool
    if not is_number or not _NUMBER.fullmatch(str(value)):
        raise InvalidValue(NOT_AN_INTEGER)
    number = Decimal(str(value))
    whole = number.to_integral_value(ROUND_HALF_UP)
    if whole != number and not field.rules.rounding:
        raise InvalidValue(NOT_AN_INTEGER)
    if int(whole) not in field.range:
        bits = field.range.stop.bit_length()
        raise InvalidValue(Fault(Reason.OUT_OF_RANGE, f"must be an integer of {bits} bits"))
    return int(whole)


def encode_response(response: IngestEventsResponse) -> bytes:
    """Return a result as the documented JSON object."""
    errors = [{"index": error.index, "error": error.error} for error in response.errors]
    return orjson.dumps(
        {"accepted": response.accepted, "rejected": response.rejected, "errors": errors}
    )
