"""Events in each of their forms: JSON as clients send it, messages, and rows of the table."""

import uuid
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import strategies as st

from productgraph.v1.event_pb2 import Event as EventMessage
from server.events.copy_rows import Row, RowEncoder
from server.events.parsed import ColumnReader, ParsedEvent
from server.events.schema import EVENT_SCHEMA

Event = dict[str, Any]

ENCODER = RowEncoder(EVENT_SCHEMA)
_READER = ColumnReader(EVENT_SCHEMA)
_NOON = 1_705_320_000  # 2024-01-15T12:00:00Z

# Every character that JSON has, lone surrogates and U+0000 included.
TEXT = st.text(st.characters(codec=None), max_size=12)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def make_event(
    project_id: str, event_id: str | None = None, changes: Mapping[str, object] | None = None
) -> Event:
    """Return an event with the required fields and these changes; by default, with a new id."""
    event = {
        "event_id": event_id or f"evt_{uuid.uuid4()}",
        "project_id": project_id,
        "session.id": "sess_1",
        "event.type": "custom",
        "event.timestamp": "2024-01-15T10:30:00Z",
    }
    return event | dict(changes or {})


def to_message(event: Event) -> EventMessage:
    """Return the message that protobuf's own JSON mapping makes of an event's JSON."""
    return ParseDict(event, EventMessage())


def make_message(
    project_id: str, event_id: str, seconds: int = _NOON, nanos: int = 0, **fields: Any
) -> EventMessage:
    """Return a valid event, as a message, with some further fields."""
    return EventMessage(
        event_id=event_id,
        project_id=project_id,
        session_id="session",
        event_type="custom",
        event_timestamp=Timestamp(seconds=seconds, nanos=nanos),
        **fields,
    )


def make_row(project_id: str, event_id: str, **fields: Any) -> Row:
    """Return the row of a valid event with some further fields."""
    return encode_message(make_message(project_id, event_id, **fields))


def encode_message(event: EventMessage) -> Row:
    """Return the row of a valid event."""
    encoded = event.SerializeToString()
    parsed = _READER.read(event, encoded)
    assert isinstance(parsed, ParsedEvent)
    return ENCODER.encode(parsed)._replace(encoded=encoded)
