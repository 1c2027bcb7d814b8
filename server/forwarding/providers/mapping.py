"""A stored event in the terms that analytics providers share, by both versions of the mapping.

Version 1 leaves out attributes and metadata whose name is reserved or taken; version 2 keeps each
under a free name. Free-form keys are taken in sorted order: the order of a protobuf map differs
from one process to the next, and a payload must not.
"""

import hashlib
import uuid
from collections.abc import Callable, Container, Iterable, Mapping
from itertools import compress, islice
from operator import attrgetter
from typing import Any, NamedTuple

import orjson
from google.protobuf.message import DecodeError

from productgraph.v1.event_pb2 import Event
from server.events.derived_messages import derive_message
from server.events.encoded_structs import UNREADABLE, keep_bytes, read_object
from server.events.free_form import read_struct
from server.events.schema import EVENT_SCHEMA, Kind
from server.events.timestamps import count_microseconds

# The hash of what stands before every name in the namespace of insert ids.
_INSERT_IDS = hashlib.sha1(
    uuid.UUID("6f1b6c0e-6a1d-4d0b-9d0c-3c5b0f2f7a51").bytes, usedforsecurity=False
)
# A UUID's variant takes two of a digit's bits.
_VARIANTS = {f"{digit:x}": "89ab"[digit % 4] for digit in range(16)}
_ANONYMOUS_ID = "user.anonymous_id"
# A 0 may have more digits than it needs, and then no zero byte. No text has these bytes.
_LONG_ZERO = b"\x80" * 4
_read_objects = attrgetter("attributes", "metadata")
# Its objects are bytes, which are read in less time than a map is made.
_PLAIN_EVENT: Any = derive_message(Event, "mapped", keep_bytes)

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


class StoredEvent(NamedTuple):
    """An event as every provider sees it, before any of their limits.

    `user_id` is empty if no user is known; `time` is in milliseconds of the Unix epoch. No text is
    longer than `size`, except for the names of displaced properties.
    """

    size: int
    name: str
    insert_id: str
    time: int
    user_id: str
    device_id: str
    fields: dict[str, Any]
    # Attributes and metadata in their order: where from, name and value.
    free_form: list[tuple[str, str, Any]]


class Limits(NamedTuple):
    """A provider's limits: characters of a text, items of a container, levels of nesting."""

    max_text: int
    max_items: int | None
    max_depth: int


# Maps the properties of an event, given those that the provider has names of its own for.
MapProperties = Callable[[StoredEvent, dict[str, Any], Limits], dict[str, Any]]
# Names an item, given its key, the names that are taken, and the longest that a name may be.
NameItem = Callable[[str, Container[str], int], str]


def read_event(encoded: bytes) -> StoredEvent:
    """Read, name and identify a stored event. Raises DecodeError or TooDeep if it is none."""
    zeros = encoded.count(0) + encoded.count(_LONG_ZERO)
    try:
        event = _PLAIN_EVENT.FromString(encoded)
        objects = []
        for sent in _read_objects(event):
            if sent:
                [data] = sent  # ValueError if it was sent in parts
                zeros -= data.count(0)
                objects.append(read_object(data, EVENT_SCHEMA.max_depth))
            else:
                objects.append({})
    except (*UNREADABLE, DecodeError):
        event = Event.FromString(encoded)
        objects = [read_struct(each, EVENT_SCHEMA.max_depth) for each in _read_objects(event)]
    attributes, metadata = objects
    free_form = []
    if attributes:
        for key, value in sorted(attributes.items()):
            free_form.append(("attributes", key.replace(".", "_"), value))
    if metadata:
        for key, value in sorted(metadata.items()):
            free_form.append(("metadata", key, value))
    microseconds = count_microseconds(event.event_timestamp)
    # A zero byte elsewhere is in a text, or stands for a field that is present and empty.
    return StoredEvent(
        len(encoded),
        # Names with a dollar merge and rename users there; ours only ever tell what happened.
        event.event_name.strip().lstrip("$") or event.event_type,
        _make_insert_id(event.project_id, event.event_id, microseconds),
        microseconds // 1000,
        event.user_id,
        _read_text(attributes.get(_ANONYMOUS_ID)) or event.session_id,
        _read_fields(event, may_have_empty=zeros != 0),
        free_form,
    )


def _read_fields(event: Any, *, may_have_empty: bool) -> dict[str, Any]:
    """Read the fields that are present; only those that are empty have to be asked whether so."""
    values = _read_values(event)
    if not may_have_empty:
        return dict(compress(zip(_NAMES, values, strict=True), values))
    return {
        name: value
        for (field_name, name, may_be_empty), value in zip(_PROPERTIES, values, strict=True)
        if value or (may_be_empty and event.HasField(field_name))
    }


def _read_text(value: Any) -> str:
    return value if isinstance(value, str) and not value.isspace() else ""


def make_insert_id(event: Event) -> str:
    """Return the id by which a provider recognises an event that it is sent again."""
    microseconds = count_microseconds(event.event_timestamp)
    return _make_insert_id(event.project_id, event.event_id, microseconds)


def _make_insert_id(project_id: str, event_id: str, microseconds: int) -> str:
    hashed = _INSERT_IDS.copy()
    hashed.update(f"{project_id}\0{event_id}\0{microseconds}".encode())
    digits = hashed.hexdigest()
    # What uuid.uuid5 does, in a third of its time: a digit is the version, another the variant.
    variant = _VARIANTS[digits[16]]
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


def map_properties_1(event: StoredEvent, own: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Map the event's own fields, then attributes, then metadata; the first of a name wins."""
    properties = dict(event.fields)
    for _, name, value in event.free_form:
        if not _is_reserved(name):
            properties.setdefault(name, value)
    return fit_items((own | properties).items(), limits, _cut_name)


def map_properties_2(event: StoredEvent, own: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Map the same, and keep what has a reserved name, or one that is taken, under a free one.

    Those that can keep their own name come first, so that no other one takes it.
    """
    max_text, max_items, _ = limits
    properties = own | event.fields
    if event.size > max_text:
        properties = {
            name: value[:max_text] if type(value) is str else value
            for name, value in properties.items()
        }
    displaced = []
    for prefix, name, value in event.free_form:
        if type(value) is str:
            value = value[:max_text]
        elif type(value) is dict or type(value) is list:
            value = _fit_value(value, limits, find_free_name, 2)
        cut = name[:max_text]
        if cut in properties or name in _RESERVED_NAMES or name.startswith(_RESERVED_PREFIXES):
            displaced.append((f"{prefix}_{name}", value))
        else:
            properties[cut] = value
    for name, value in displaced:
        properties[find_free_name(name, properties, max_text)] = value
    if max_items is not None and len(properties) > max_items:
        properties = dict(islice(properties.items(), max_items))
    return properties


def _is_reserved(name: str) -> bool:
    return name in _RESERVED_NAMES or name.startswith(_RESERVED_PREFIXES)


def _cut_name(name: str, _taken: Container[str], max_text: int) -> str:
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
_NAMES = [name for _, name, _ in _PROPERTIES]
_read_values = attrgetter(*(field_name for field_name, _, _ in _PROPERTIES))

# By the version of the mapping.
VERSIONS: Mapping[int, MapProperties] = {1: map_properties_1, 2: map_properties_2}
