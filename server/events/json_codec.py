"""JSON bytes to rows or Events, by the documented field names, and results back to JSON.

Most events become rows by a few calls in C. What these do not take is read field by field: to name
the first one that is wrong, or to accept what only looked wrong.
"""

import re
from codecs import BOM_UTF8
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
from server.errors import InvalidArgument, InvalidEvents
from server.events.batch import ParsedBatch, ReadEvent
from server.events.free_form import LostDigits, fill_struct
from server.events.json_parser import (
    Document,
    check_values,
    encode_document,
    parse_document,
    parse_exactly,
)
from server.events.parsed import ColumnReader, MalformedEvent, ParsedEvent
from server.events.problems import (
    NOT_A_STRING,
    NOT_A_TIMESTAMP,
    NOT_AN_EVENT,
    NOT_AN_INTEGER,
    NOT_AN_OBJECT,
    NOT_UTF8,
    Fault,
    InvalidValue,
    Problem,
    Reason,
    report_excess,
)
from server.events.quick_json import QuickReader, find_special
from server.events.redaction import Redactor
from server.events.schema import MAX_BATCH_SIZE, Field, Kind, Schema
from server.events.timestamps import parse_timestamp
from server.protocols import HTTP

# A number as JSON writes it, no longer than any double is written.
_NUMBER = re.compile(r"-?\d{1,40}(\.\d{1,40})?([eE][+-]?\d{1,3})?", re.ASCII)
# A character of a row takes up to six bytes of JSON (an escape); the rest is for what a row lacks.
_BYTES_PER_CHARACTER = 8
# How orjson writes a float that may have been an integer with more digits.
_LONG_NUMBER = re.compile(rb"\de\+(1[89]|[2-9]\d|\d{3})")


class JsonCodec:
    """Reads batches of events by one schema, with `quick` most of them in one go."""

    def __init__(
        self,
        schema: Schema,
        quick: QuickReader | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self._quick = quick
        self._redactor = redactor
        self._fields = schema.fields
        self._name_of = {field.wire_name: field.name for field in schema.fields}.get
        self._catch_all = schema.catch_all
        self._columns = ColumnReader(schema)
        self._max_depth = schema.max_depth
        self._max_bytes = schema.max_bytes

    def parse_batch(
        self, body: bytes, deadline: Deadline = NEVER, project_id: str | None = None
    ) -> ParsedBatch:
        """Return the events of a request's body in order, each parsed when it is asked for.

        So one event at a time is in memory, and in the processor's cache, beside the document.
        An event that is plainly valid for the project comes as its row, if a project is given.
        Raises InvalidArgument if the body is not JSON, not of the documented shape, or holds too
        many events or values, and Unavailable if it takes longer to read than is left.
        """
        body = body.removeprefix(BOM_UTF8)
        check_values(body, deadline)
        received = _ReceivedEvents(body, deadline)
        if self._redactor is not None:
            received.redact(self._redactor, is_measured=len(body) > self._max_bytes // 2)
        count, events = len(received.items), self._parse_items(received)
        if self._quick is not None and project_id is not None:
            events = self._parse_quickly(self._quick, received, project_id, find_special(body))
        return ParsedBatch(HTTP, count, len(body), events, received.encode)

    def _parse_quickly(
        self, quick: QuickReader, received: "_ReceivedEvents", project_id: str, special: str
    ) -> Iterator[ReadEvent]:
        # The JSON of a row of so few characters need not be measured.
        small = -1 if received.is_measured else self._max_bytes // _BYTES_PER_CHARACTER
        for index, item in enumerate(received.items):
            row = quick.read(item, project_id, special)
            if row is not None and (
                len(row.text) <= small or received.measure(index) <= self._max_bytes
            ):
                yield row
            else:
                yield self._parse_item(received, index)

    def _parse_items(self, received: "_ReceivedEvents") -> Iterator[ReadEvent]:
        return (self._parse_item(received, index) for index in range(len(received.items)))

    def _parse_item(self, received: "_ReceivedEvents", index: int) -> ParsedEvent | MalformedEvent:
        try:
            return self._parse_event(received.items[index], index, received)
        except LostDigits:
            return self._parse_event(received.exact_items[index], index, received)

    def _parse_event(
        self, item: Any, index: int, received: "_ReceivedEvents"
    ) -> ParsedEvent | MalformedEvent:
        if type(item) is not dict:
            problem = Problem("event", *item) if item is NOT_UTF8 else NOT_AN_EVENT
            return MalformedEvent(Event(), 0, problem)
        fields = self._collect_fields(item)
        if received.measure(index) <= self._max_bytes:
            return self._set_fields(fields)
        # Objects are not unfolded: that could take seconds.
        parsed = self._set_fields({n: v for n, v in fields.items() if type(v) is not dict})
        if isinstance(parsed, MalformedEvent):
            return parsed
        return MalformedEvent(parsed.event, len(self._fields), report_excess(self._max_bytes))

    def _collect_fields(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that are present, by proto name; those that the schema lacks in one."""
        fields: dict[str, Any] = {}
        unnamed: dict[str, Any] = {}
        for name, value in item.items():
            if value is not None:
                known = self._name_of(name)
                (fields if known else unnamed)[known or name] = value
        sent = fields.get(self._catch_all.name, {})
        if type(sent) is not dict:
            fields[self._catch_all.name] = unnamed | {self._catch_all.wire_name: sent}
        elif unnamed:
            fields[self._catch_all.name] = sent | unnamed
        return fields

    def _set_fields(self, fields: dict[str, Any]) -> ParsedEvent | MalformedEvent:
        """Set field by field in the order of the schema, up to the first that is malformed."""
        event = Event()
        unnamed = tuple(fields.get(self._catch_all.name, ()))
        for field in self._fields:
            if field.name not in fields:
                continue
            try:
                self._set_field(event, field, fields[field.name])
            except InvalidValue as error:
                problem = Problem(field.wire_name, *error.fault)
                return MalformedEvent(event, field.position, problem, unnamed)
        return self._columns.read(event, event.SerializeToString())

    def _set_field(self, event: Event, field: Field, value: Any) -> None:
        if value is NOT_UTF8:
            raise InvalidValue(NOT_UTF8)
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


class _ReceivedEvents:
    """The events of a body as values, by the quick parser and, if it is needed, the exact one."""

    def __init__(self, body: bytes, deadline: Deadline) -> None:
        self._body = body
        self._deadline = deadline
        self._quick = parse_document(body, deadline)
        self.items = _read_items(self._quick)
        self._redactor: Redactor | None = None
        self._sizes: list[int] | None = None

    def redact(self, redactor: Redactor, *, is_measured: bool) -> None:
        """Redact all events; if `is_measured`, their sizes stay those from before."""
        if is_measured:
            self._sizes = [len(self._encode(index)) for index in range(len(self.items))]
        self._redactor = redactor
        _redact_document(self._quick, redactor)
        if "_exact" in self.__dict__:
            _redact_document(self._exact, redactor)

    @cached_property
    def _exact(self) -> Document:
        document = parse_exactly(self._body, self._deadline)
        if self._redactor is not None:
            _redact_document(document, self._redactor)
        return document

    @property
    def exact_items(self) -> list[Any]:
        return _read_items(self._exact)

    @property
    def is_measured(self) -> bool:
        """Return whether events were larger before: then no row tells their sizes."""
        return self._sizes is not None

    def measure(self, index: int) -> int:
        """Return the bytes of the JSON of one as it was sent."""
        return len(self._encode(index)) if self._sizes is None else self._sizes[index]

    def encode(self, index: int) -> bytes | None:
        """Return the JSON of one, as orjson writes it; None if it cannot be redacted."""
        if self._redactor is not None and not isinstance(self.items[index], dict):
            return None
        return self._encode(index)

    def _encode(self, index: int) -> bytes:
        """Return the JSON of one with all digits that it had."""
        encoded = encode_document(self._quick.raw["events"][index])
        if not _LONG_NUMBER.search(encoded):
            return encoded
        return encode_document(self._exact.raw["events"][index])


def _redact_document(document: Document, redactor: Redactor) -> None:
    for item in _read_items(document):
        redactor.redact_item(item)
    if document.raw is not document.value:
        for item in document.raw["events"]:
            redactor.redact_item(item)


def _read_items(document: Document) -> list[Any]:
    root = document.value
    if type(root) is not dict:
        raise InvalidArgument(document.damage or "body: must be an object")
    items = root.get("events")
    if document.damage and (items is NOT_UTF8 or _holds_damage(root)):
        raise InvalidArgument(document.damage)
    if type(items) is not list:
        raise InvalidArgument("events: must be an array")
    if len(items) > MAX_BATCH_SIZE:
        raise InvalidArgument(f"events: more than {MAX_BATCH_SIZE} in one batch")
    return items


def _holds_damage(root: dict[str, Any]) -> bool:
    """Tell whether anything beside the events is not UTF-8."""
    pending: list[Any] = [value for name, value in root.items() if name != "events"]
    while pending:
        value = pending.pop()
        if value is NOT_UTF8:
            return True
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
    return False


def _set_timestamp(target: Timestamp, value: Any) -> None:
    if value == "":
        return
    if type(value) is not str:
        raise InvalidValue(NOT_A_TIMESTAMP)
    try:
        target.seconds, target.nanos = parse_timestamp(value)
    except ValueError:
        raise InvalidValue(NOT_A_TIMESTAMP) from None


def _read_integer(value: Any, field: Field) -> int:
    """Read an integer as proto3's JSON mapping does, rounded if the field's rules say so."""
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
    """Write a result as the documented JSON object."""
    errors = [{"index": error.index, "error": error.error} for error in response.errors]
    return orjson.dumps(
        {"accepted": response.accepted, "rejected": response.rejected, "errors": errors}
    )


def encode_invalid_events(refusal: InvalidEvents) -> bytes:
    """Write why a batch was refused as a whole, its errors as a result has them."""
    errors = [{"index": index, "error": text} for index, text in refusal.errors]
    outcome = {"accepted": 0, "rejected": len(errors), "errors": errors}
    return orjson.dumps({"error": str(refusal)} | outcome)
