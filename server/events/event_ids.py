"""The id of an event that was kept as it was received."""

import orjson
from google.protobuf.message import DecodeError

from productgraph.v1.event_pb2 import Event
from server.events.schema import EVENT_SCHEMA
from server.protocols import HTTP

_FIELD = next(field for field in EVENT_SCHEMA.fields if field.name == "event_id")


def read_event_id(protocol: str, event: bytes) -> str | None:
    """Return the id of an event, or None if it has none that an event can have."""
    event_id = _read_json(event) if protocol == HTTP else _read_protobuf(event)
    if not isinstance(event_id, str) or "\0" in event_id:
        return None
    return event_id if 0 < len(event_id.encode()) <= _FIELD.rules.max_bytes else None


def _read_json(event: bytes) -> object:
    try:
        value = orjson.loads(event)
    except ValueError:
        return None
    return value.get(_FIELD.wire_name) if isinstance(value, dict) else None


def _read_protobuf(event: bytes) -> object:
    try:
        return Event.FromString(event).event_id
    except DecodeError:
        return None
