"""JSON bytes to Events, by the documented field names, and results back to JSON.

Most events are built by a few calls in C. Whatever these refuse is read again with care: to name
the first field that is wrong, or to accept what only looked wrong.
"""

import re
from contextlib import suppress
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import orjson

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from productgraph.v1.event_pb2 import Event
from server.errors import InvalidArgument
from server.json_document import parse_document, parse_exactly
from server.schema import MAX_BATCH_SIZE, Field, Kind, Schema
from server.structs import LostDigits, fill_struct
from server.timestamps import parse_timestamp
from server.validation import NOT_A_TIMESTAMP, NOT_AN_EVENT, MalformedEvent

# A number as JSON writes it, no longer than any within the range of a field could be.
_NUMBER = re.compile(r"-?\d{1,40}(\.\d{1,40})?([eE][+-]?\d{1,2})?", re.ASCII)


class JsonCodec:
    """Reads batches of events by one schema."""

    def __init__(self, schema: Schema) -> None:
        self._fields = schema.fields
        scalars = schema.of_kind(Kind.TEXT, Kind.INTEGER, Kind.LONG)
        composites = schema.of_kind(Kind.TIMESTAMP, Kind.OBJECT)
        self._scalar_names = {field.wire_name: field.name for field in scalars}
        self._composites = {field.wire_name: field for field in composites}
        self._rounded = [field for field in scalars if field.rules.rounding]
        self._catch_all = schema.catch_all.wire_name
        # One level more than allowed, for the validator to see.
        self._depth = schema.max_depth + 1

    def parse_batch(self, body: bytes) -> list[Event | MalformedEvent]:
        """The events of a request's body, in order.

        Raises InvalidArgument where the body is not JSON, not of the documented shape, or holds
        too many events.
        """
        try:
            return [self._parse_event(item) for item in _read_items(parse_document(body))]
        except LostDigits:
            return [self._parse_event(item) for item in _read_items(parse_exactly(body))]

    def _parse_event(self, item: Any) -> Event | MalformedEvent:
        if type(item) is not dict:
            return MalformedEvent(Event(), 0, NOT_AN_EVENT)
        scalars, composites = self._sort_fields(item)
        try:
            for field in self._rounded:
                if type(scalars.get(field.name)) is float:
                    scalars[field.name] = _read_integer(scalars[field.name], field)
            event = Event(**scalars)
            for wire_name, value in composites.items():
                self._set_composite(event, self._composites[wire_name], value)
        except (TypeError, ValueError):
            return self._parse_carefully(item, composites)
        return event

    def _sort_fields(self, item: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The scalars by proto name; timestamps and objects by wire name, unnamed fields in one."""
        scalars: dict[str, Any] = {}
        composites: dict[str, Any] = {}
        unnamed: dict[str, Any] = {}
        for wire_name, value in item.items():
            if name := self._scalar_names.get(wire_name):
                scalars[name] = value
            elif value is None:
                continue
            elif wire_name in self._composites:
                composites[wire_name] = value
            else:
                unnamed[wire_name] = value
        self._merge_unnamed(composites, unnamed)
        return scalars, composites

    def _merge_unnamed(self, composites: dict[str, Any], unnamed: dict[str, Any]) -> None:
        sent = composites.get(self._catch_all)
        if type(sent) is dict:
            composites[self._catch_all] = sent | unnamed
        elif sent is not None:
            composites[self._catch_all] = unnamed | {self._catch_all: sent}
        elif unnamed:
            composites[self._catch_all] = unnamed

    def _parse_carefully(
        self, item: dict[str, Any], composites: dict[str, Any]
    ) -> Event | MalformedEvent:
        """Sets field by field in the order of the schema, up to the first that is malformed."""
        event = Event()
        values = item | composites
        for field in self._fields:
            value = values.get(field.wire_name)
            if value is None:
                continue
            try:
                self._set_field(event, field, value)
            except ValueError as problem:
                return MalformedEvent(event, field.position, f"{field.wire_name}: {problem}")
        return event

    def _set_field(self, event: Event, field: Field, value: Any) -> None:
        if field.wire_name in self._composites:
            self._set_composite(event, field, value)
        elif field.kind is Kind.TEXT:
            if type(value) is not str:
                raise ValueError("must be a string")
            setattr(event, field.name, value)
        else:
            setattr(event, field.name, _read_integer(value, field))

    def _set_composite(self, event: Event, field: Field, value: Any) -> None:
        target = getattr(event, field.name)
        if field.kind is Kind.OBJECT:
            if type(value) is not dict:
                raise ValueError("must be an object")
            target.SetInParent()
            fill_struct(target, value, self._depth)
        elif value != "":
            target.seconds, target.nanos = _read_timestamp(value)


def _read_items(document: Any) -> list[Any]:
    if type(document) is not dict:
        raise InvalidArgument("body: must be an object")
    items = document.get("events")
    if type(items) is not list:
        raise InvalidArgument("events: must be an array")
    if len(items) > MAX_BATCH_SIZE:
        raise InvalidArgument(f"events: more than {MAX_BATCH_SIZE} in one batch")
    return items


def _read_timestamp(value: Any) -> tuple[int, int]:
    if type(value) is str:
        with suppress(ValueError):
            return parse_timestamp(value)
    raise ValueError(NOT_A_TIMESTAMP)


def _read_integer(value: Any, field: Field) -> int:
    """An integer as proto3's JSON mapping takes it, rounded where the field's rules say so."""
    text = value if type(value) is str else repr(value) if type(value) is float else str(value)
    if type(value) is bool or not _NUMBER.fullmatch(text):
        raise ValueError("must be an integer")
    number = Decimal(text)
    whole = number.to_integral_value(ROUND_HALF_UP)
    if whole != number and not field.rules.rounding:
        raise ValueError("must be an integer")
    if int(whole) not in field.range:
        raise ValueError(f"must be an integer of {field.range.stop.bit_length()} bits")
    return int(whole)


def encode_response(response: IngestEventsResponse) -> bytes:
    """A result as the documented JSON object."""
    errors = [{"index": error.index, "error": error.error} for error in response.errors]
    return orjson.dumps(
        {"accepted": response.accepted, "rejected": response.rejected, "errors": errors}
    )
