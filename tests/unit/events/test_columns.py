"""Both edges agree on what an event says for each column."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from productgraph.v1.event_pb2 import Event
from server.events.json_codec import JsonCodec
from server.events.parsed import ColumnReader, MalformedEvent, ParsedEvent
from server.events.schema import EVENT_SCHEMA, Field, Kind
from tests.support.events import JSON

CODEC = JsonCodec(EVENT_SCHEMA)
READER = ColumnReader(EVENT_SCHEMA)
SCALARS = EVENT_SCHEMA.of_kind(Kind.TEXT, Kind.INTEGER, Kind.LONG)
OPTIONAL = [field for field in SCALARS if not field.rules.required]
NAMES = [field.name for field in EVENT_SCHEMA.columns]
OBJECTS = [field.name for field in EVENT_SCHEMA.of_kind(Kind.OBJECT)]

REQUIRED = {"event_id": "e", "project_id": "p", "session.id": "s", "event.type": "custom"}

names = [f.wire_name for f in EVENT_SCHEMA.fields if f.wire_name not in REQUIRED]
fields = st.sampled_from(names) | st.text(max_size=3)
# Values that fields take, and any others.
values = st.text(max_size=5) | st.integers(-3, 3) | st.floats(-2, 2) | JSON
events = st.dictionaries(fields, values, max_size=12)


def nest(levels: int) -> dict[str, Any]:
    """Return an object of this many levels."""
    return {"k": nest(levels - 1)} if levels > 1 else {}


def read(**fields: Any) -> ParsedEvent | MalformedEvent:
    """Return what is read off an event with these fields."""
    event = Event(**fields)
    return READER.read(event, event.SerializeToString())


def describe(parsed: ParsedEvent | MalformedEvent) -> dict[str, Any]:
    """Return the columns that are present, equal if PostgreSQL reads the same from them."""
    assert isinstance(parsed, ParsedEvent)
    texts = dict(zip(NAMES, parsed.columns, strict=True))
    assert all(texts[name] == "" for name in parsed.empty)
    present = {name: text for name, text in texts.items() if text or name in parsed.empty}
    return {name: orjson.loads(text) if name in OBJECTS else text for name, text in present.items()}


@given(events)
@example({"metadata": {"a": 1.0, "b": -0.0, "c": 2**63, "d": [1, [0.5]], "e": 2**53 + 1}})
@example({"metadata": nest(32), "ui.viewport": [nest(31)]})
@example({"event.sequence": 0, "api.duration_ms": -0.4, "user.id": ""})
@example({"metadata": {"": [1] * 900 + [[], {}, True, None, "", "\U0001f600"] * 50}})
@example({"org.id": None, "page.path": None, "metadata": None})
@example({"attributes": {"org.id": "lost" * 99}, "org.id": "o"})
@example({"event.timestamp": "2024-01-15T10:30:00." + "9" * 10_000})
@example({"event.sequence": "0" * 40 + "." + "0" * 40, "page.title": "\x01\0\ud83d\U0001f600" * 9})
@example({"metadata": {"\x1f": "\x01" * 500, "a": -0.0, "b": 1e15, "c": 10**40, "d": 1.0}})
def test_columns_are_read_alike_after_a_trip_as_protobuf(event: dict[str, Any]) -> None:
    """Columns of a JSON event are those of the same event over gRPC, and all are texts."""
    batch = CODEC.parse_batch(json.dumps({"events": [REQUIRED | event]}).encode())
    [parsed] = batch.events
    if isinstance(parsed, ParsedEvent):
        encoded = parsed.event.SerializeToString()
        assert describe(parsed) == describe(READER.read(Event.FromString(encoded), encoded))
        assert {type(text) for text in parsed.columns} == {str}


@pytest.mark.parametrize("name", OBJECTS)
def test_json_objects_may_nest_32_levels(name: str) -> None:
    """An object of 32 levels is read, one of 33 is malformed, under its documented name."""
    parsed, malformed = read(**{name: nest(32)}), read(**{name: nest(33)})
    assert isinstance(parsed, ParsedEvent)
    assert parsed.columns[NAMES.index(name)].count("{") == 32
    assert isinstance(malformed, MalformedEvent)
    assert str(malformed.problem) == f"{name}: nested more than 32 levels deep"


@pytest.mark.parametrize("field", OPTIONAL, ids=lambda field: field.name)
@pytest.mark.parametrize(
    "metadata", [{"zero": 0, "one": 1, "no": False}, {}], ids=["full", "empty"]
)
def test_an_empty_optional_field_is_not_absent(field: Field, metadata: dict[str, Any]) -> None:
    """A zero or empty optional field is told from an absent one, whatever else the event holds."""
    empty: Any = "" if field.kind is Kind.TEXT else 0
    columns = describe(read(metadata=metadata, **{field.name: empty}))
    assert columns == {"metadata": metadata, field.name: str(empty)}
