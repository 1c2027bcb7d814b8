"""A stored event in the terms that analytics providers share, by both versions of the mapping.

Version 1 leaves out attributes and metadata whose name is reserved or taken; version 2 keeps each
under a free name. Free-form keys are taken in sorted order: the order of a protobuf map differs
from one process to the next, and a payload must not.
"""

import hashlib
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import islice
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import orjson
from google.protobuf.message import Message

from productgraph.v1.event_pb2 import Event
from server.events.free_form import read_struct
from server.events.schema import EVENT_SCHEMA, Kind
from server.events.timestamps import count_microseconds

# The hash of what stands before every name in the namespace of insert ids.
_INSERT_IDS = hashlib.sha1(
    uuid.UUID("6f1b6c0e-6a1d-4d0b-9d0c-3c5b0f2f7a51").bytes, usedforsecurity=False
)
_ANONYMOUS_ID = "user.anonymous_id"

# Values that a provider takes for an accident of the client, in upper or lower case.
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

# Names by which a client could pose as another user, place or project.
_RESERVED_NAMES = frozenset({"ip", "token", "time", "distinct_id"})
_RESERVED_PREFIXES = ("$", "mp_")


class MappedEvent(NamedTuple):
    """An event as every provider sees it, before any of their limits.

    `user_id` is empty if no user is known; `time` is in milliseconds of the Unix epoch.
    """

    name: str
    insert_id: str
    time: int
    user_id: str
    device_id: str
    properties: dict[str, Any]


class Limits(NamedTuple):
    """A provider's limits: characters of a text, items of a container, levels of nesting."""

    max_text: int
    max_items: int | None
    max_depth: int


# Reads the properties of an event, given its attributes too.
ReadProperties = Callable[[Event, Mapping[str, Any]], dict[str, Any]]
# Names an item, given its key, the names that are taken, and the longest that a name may be.
NameItem = Callable[[str, Container[str], int], str]


def map_event(event: Event, read_properties: ReadProperties) -> MappedEvent:
    """Name, identify and flatten a storable event."""
    attributes = _read_object(event, "attributes")
    return MappedEvent(
        # Names with a dollar merge and rename users there; ours only ever tell what happened.
        name=event.event_name.strip().lstrip("$") or event.event_type,
        insert_id=make_insert_id(event),
        time=count_microseconds(event.event_timestamp) // 1000,
        user_id=event.user_id,
        device_id=_read_text(attributes.get(_ANONYMOUS_ID)) or event.session_id,
        properties=read_properties(event, attributes),
    )


def _read_object(event: Event, name: Literal["attributes", "metadata"]) -> dict[str, Any]:
    if not event.HasField(name):
        return {}
    return read_struct(getattr(event, name), EVENT_SCHEMA.max_depth)


def _read_text(value: Any) -> str:
    return value if isinstance(value, str) and not value.isspace() else ""


def make_insert_id(event: Event) -> str:
    """Return the id by which a provider recognises an event that it is sent again."""
    microseconds = count_microseconds(event.event_timestamp)
    hashed = _INSERT_IDS.copy()
    hashed.update(f"{event.project_id}\0{event.event_id}\0{microseconds}".encode())
    digits = hashed.hexdigest()
    # What uuid.uuid5 does, in a third of its time: a digit is the version, another the variant.
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


def read_properties_1(event: Event, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Read the event's own fields, then attributes, then metadata; the first of a name wins."""
    properties = _read_fields(event)
    for _, name, value in _list_free_form(event, attributes):
        if not _is_reserved(name):
            properties.setdefault(name, value)
    return properties


def read_properties_2(
    event: Event, attributes: Mapping[str, Any], *, max_text: int
) -> dict[str, Any]:
    """Read the same, and keep what has a reserved name, or one that is taken, under a free one.

    Those that can keep their own name come first, so that no other one takes it.
    """
    properties = _read_fields(event)
    displaced = []
    for prefix, name, value in _list_free_form(event, attributes):
        cut = name[:max_text]
        if cut in properties or _is_reserved(name):
            displaced.append((f"{prefix}_{name}", value))
        else:
            properties[cut] = value
    for name, value in displaced:
        properties[find_free_name(name, properties, max_text)] = value
    return properties


def _read_fields(event: Message) -> dict[str, Any]:
    """Read the fields that are present; only those that are empty have to be asked whether so."""
    return {
        property_name: value
        for (name, property_name, may_be_empty), value in zip(
            _PROPERTIES, _read_values(event), strict=True
        )
        if value or (may_be_empty and event.HasField(name))
    }


def _list_free_form(event: Event, attributes: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield attributes and metadata in their order: where from, name and value."""
    for key, value in sorted(attributes.items()):
        yield "attributes", key.replace(".", "_"), value
    for key, value in sorted(_read_object(event, "metadata").items()):
        yield "metadata", key, value


def _is_reserved(name: str) -> bool:
    return name in _RESERVED_NAMES or name.startswith(_RESERVED_PREFIXES)


def cut_name(name: str, _taken: Container[str], max_text: int) -> str:
    """Cut a name to what a provider takes, as version 1 does, whether it is taken or not."""
    return name[:max_text]


def find_free_name(name: str, taken: Container[str], max_text: int) -> str:
    """Return a name as it is, cut, or else cut and numbered, so that it is not taken."""
    free, number = name[:max_text], 1
    while free in taken:
        number += 1
        suffix = f"_{number}"
        free = name[: max_text - len(suffix)] + suffix
    return free


def fit_id(value: str, max_bytes: int) -> str:
    """Return an id that a provider takes: the value, or its SHA-256 in hex if that is refused."""
    encoded = value.encode()
    if value.strip().casefold() in REFUSED_IDS or len(encoded) > max_bytes:
        return hashlib.sha256(encoded).hexdigest()[:max_bytes]
    return value


def fit_items(
    items: Iterable[tuple[str, Any]], limits: Limits, name_item: NameItem, depth: int = 1
) -> dict[str, Any]:
    """Return an object, `depth` levels down, with as many items as it may have, within limits."""
    fitting: dict[str, Any] = {}
    max_text = limits.max_text
    for key, value in islice(items, limits.max_items):
        # A call for each name and each value took half of all mapping: few need one.
        if len(key) > max_text or key in fitting:
            key = name_item(key, fitting, max_text)
        if type(value) is str:
            fitting[key] = value[:max_text]
        elif type(value) is dict or type(value) is list:
            fitting[key] = _fit_value(value, limits, name_item, depth + 1)
        else:
            fitting[key] = value
    return fitting


def _fit_value(value: Any, limits: Limits, name_item: NameItem, depth: int) -> Any:
    if type(value) is str:
        return value[: limits.max_text]
    if type(value) is not dict and type(value) is not list:
        return value
    if depth > limits.max_depth:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()[: limits.max_text]
    if isinstance(value, dict):
        return fit_items(sorted(value.items()), limits, name_item, depth)
    return [_fit_value(item, limits, name_item, depth + 1) for item in value[: limits.max_items]]


def _name_property(field_name: str) -> str:
    if field_name == "event_sequence":
        return "sequence"
    return field_name.removeprefix("ui_").removeprefix("gen_ai_")


# In the order of the schema.
_PROPERTIES = [
    (field.name, _name_property(field.name), not field.rules.required)
    for field in EVENT_SCHEMA.of_kind(Kind.TEXT, Kind.INTEGER, Kind.LONG)
    # These have a place of their own in every payload.
    if field.name not in ("event_id", "event_name", "user_id")
]
_read_values = attrgetter(*(name for name, _, _ in _PROPERTIES))
