"""A stored event in the terms that analytics providers share, version 1 of the mapping.

Free-form keys are taken in sorted order: the order of a protobuf map differs from one process to
the next, and a payload must not.
"""

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import orjson

from productgraph.v1.event_pb2 import Event
from server.events.free_form import read_struct
from server.events.schema import EVENT_SCHEMA, Kind

_INSERT_IDS = uuid.UUID("6f1b6c0e-6a1d-4d0b-9d0c-3c5b0f2f7a51")
_ANONYMOUS_ID = "user.anonymous_id"

# Values that a provider takes for an accident of the client's, in any case of letters.
REFUSED_IDS = frozenset(
    {"", "0", "-1", "[]", "{}", "<nil>", "anon", "anonymous", "false", "lmy47d", "n/a", "na", "nan"}
    | {
        "nil",
        "none",
        "null",
        "true",
        "undefined",
        "unknown",
        "00000000-0000-0000-0000-000000000000",
    }
)

# Names by which a client could pose as another user, another place or another project.
_RESERVED_NAMES = frozenset({"ip", "token", "time", "distinct_id"})
_RESERVED_PREFIXES = ("$", "mp_")


@dataclass(frozen=True)
class MappedEvent:
    """An event as every provider sees it, before any of their limits.

    `user_id` is empty where no user is known; `time` is in milliseconds of the Unix epoch.
    """

    name: str
    insert_id: str
    time: int
    user_id: str
    device_id: str
    properties: dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What a provider takes: characters of a text, items of a container, levels of nesting."""

    max_text: int
    max_items: int | None
    max_depth: int


def map_event(event: Event) -> MappedEvent:
    """Names, identifies and flattens a storable event."""
    attributes = read_struct(event.attributes, EVENT_SCHEMA.max_depth)
    return MappedEvent(
        # Names with a dollar merge and rename users there; ours only ever tell what happened.
        name=event.event_name.strip().lstrip("$") or event.event_type,
        insert_id=_make_insert_id(event),
        time=event.event_timestamp.seconds * 1000 + event.event_timestamp.nanos // 1_000_000,
        user_id=event.user_id,
        device_id=_read_text(attributes.get(_ANONYMOUS_ID)) or event.session_id,
        properties=_read_properties(event, attributes),
    )


def _read_text(value: Any) -> str:
    return value if isinstance(value, str) and not value.isspace() else ""


def _make_insert_id(event: Event) -> str:
    timestamp = event.event_timestamp
    microseconds = timestamp.seconds * 1_000_000 + timestamp.nanos // 1000
    return str(uuid.uuid5(_INSERT_IDS, f"{event.project_id}\0{event.event_id}\0{microseconds}"))


def _read_properties(event: Event, attributes: dict[str, Any]) -> dict[str, Any]:
    """The event's own fields first, then attributes, then metadata; the first of a name wins."""
    properties = {
        _PROPERTY_NAMES[field.name]: value
        for field, value in event.ListFields()
        if field.name in _PROPERTY_NAMES
    }
    for key, value in sorted(attributes.items()):
        _add_property(properties, key.replace(".", "_"), value)
    for key, value in sorted(read_struct(event.metadata, EVENT_SCHEMA.max_depth).items()):
        _add_property(properties, key, value)
    return properties


def _add_property(properties: dict[str, Any], name: str, value: Any) -> None:
    if name not in _RESERVED_NAMES and not name.startswith(_RESERVED_PREFIXES):
        properties.setdefault(name, value)


def fit_id(value: str, max_bytes: int) -> str:
    """An id that a provider takes: the value, or its SHA-256 in hex where it would be refused."""
    encoded = value.encode()
    if value.strip().casefold() in REFUSED_IDS or len(encoded) > max_bytes:
        return hashlib.sha256(encoded).hexdigest()[:max_bytes]
    return value


def fit_items(items: Iterable[tuple[str, Any]], limits: Limits, depth: int = 1) -> dict[str, Any]:
    """An object of `depth` levels down, of as many items as it may have, each within limits."""
    return {
        key[: limits.max_text]: _fit_value(value, limits, depth + 1)
        for key, value in islice(items, limits.max_items)
    }


def _fit_value(value: Any, limits: Limits, depth: int) -> Any:
    if isinstance(value, str):
        return value[: limits.max_text]
    if not isinstance(value, dict | list):
        return value
    if depth > limits.max_depth:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()[: limits.max_text]
    if isinstance(value, dict):
        return fit_items(sorted(value.items()), limits, depth)
    return [_fit_value(item, limits, depth + 1) for item in value[: limits.max_items]]


def _name_property(field_name: str) -> str:
    if field_name == "event_sequence":
        return "sequence"
    return field_name.removeprefix("ui_").removeprefix("gen_ai_")


_PROPERTY_NAMES = {
    field.name: _name_property(field.name)
    for field in EVENT_SCHEMA.of_kind(Kind.TEXT, Kind.INTEGER, Kind.LONG)
    # These have a place of their own.
    if field.name not in ("event_id", "event_name", "user_id")
}
