"""A received event for reading: JSON, protobuf's text format, or what can be read of them."""

import json
from typing import Any

from google.protobuf import text_format
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from productgraph.v1.event_pb2 import Event
from server.events.free_form import TooDeep, read_struct
from server.events.schema import EVENT_SCHEMA, Field, Kind
from server.events.timestamps import is_storable
from server.protocols import HTTP


def spell_event(protocol: str, received: bytes) -> str:
    """Return the text of an event that was received over this protocol; it may be malformed."""
    return _spell_json(received) if protocol == HTTP else _spell_protobuf(received)


def name_fields(event: Event) -> dict[str, Any] | None:
    """Return an event by its names on the wire; None if it nests too deep to be sent in again."""
    try:
        return {
            field.wire_name: _read_field(event, field)
            for field in EVENT_SCHEMA.fields
            if _is_present(event, field)
        }
    except TooDeep:
        return None


def _is_present(event: Message, field: Field) -> bool:
    if field.rules.required and field.kind is Kind.TEXT:
        return bool(getattr(event, field.name))
    return event.HasField(field.name)


def _read_field(event: Event, field: Field) -> Any:
    value = getattr(event, field.name)
    if field.kind is Kind.TIMESTAMP:
        return value.ToJsonString() if is_storable(value) else None
    return read_struct(value, EVENT_SCHEMA.max_depth) if field.kind is Kind.OBJECT else value


def _spell_json(received: bytes) -> str:
    text = received.decode(errors="replace")
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _spell_protobuf(received: bytes) -> str:
    # If a text is not UTF-8, the fields can still be shown by their numbers.
    for kind in (Event, Empty):
        try:
            message: Message = kind.FromString(received)
        except DecodeError:
            continue
        return text_format.MessageToString(message, as_utf8=True, print_unknown_fields=True)
    return received.hex(" ")
