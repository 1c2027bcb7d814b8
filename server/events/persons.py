"""The ids of a person, and those that an event carries, read from each of its forms."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import orjson
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct, Value

from productgraph.v1.event_pb2 import Event
from server.errors import InvalidArgument
from server.events.copy_rows import Row, split_cells
from server.events.derived_messages import derive_message
from server.events.free_form import REPLACEMENT
from server.events.json_parser import parse_document
from server.events.schema import EVENT_SCHEMA
from server.protocols import HTTP

# The schema does not name it: it is one of the attributes.
ANONYMOUS_ID = "user.anonymous_id"
_USER_ID = "user.id"
_ATTRIBUTES = EVENT_SCHEMA.catch_all.wire_name


class EventIds(NamedTuple):
    """The ids in an event: empty if it has none, None if they cannot be read."""

    user: str | None
    anonymous: str | None


_UNREADABLE = EventIds(None, None)


@dataclass(frozen=True)
class Person:
    """A person of a project: the `user.id` and the `user.anonymous_id`s of their events."""

    project_id: str
    user_id: str | None
    anonymous_ids: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """Return all ids."""
        return (*(() if self.user_id is None else (self.user_id,)), *self.anonymous_ids)

    def owns(self, ids: EventIds) -> bool | None:
        """Return whether an event with these ids is this person's; None if that is unknown."""
        if ids.user is not None and ids.user == self.user_id:
            return True
        if ids.anonymous is not None and ids.anonymous in self.anonymous_ids:
            return True
        is_known = (self.user_id is None or ids.user is not None) and (
            not self.anonymous_ids or ids.anonymous is not None
        )
        return False if is_known else None

    def may_own(self, encoded: bytes) -> bool:
        """Return whether protobuf bytes may hold an event of this person; quick."""
        return any(_is_number(each) or each.encode() in encoded for each in self.ids)


def read_ids(protocol: str, event: bytes) -> EventIds:
    """Return the ids of an event that was received over this protocol; it may be malformed."""
    return _read_json(event) if protocol == HTTP else _read_protobuf(event)


def _read_json(event: bytes) -> EventIds:
    try:
        value = parse_document(event).value
    except InvalidArgument:
        return _UNREADABLE
    return find_ids(value) if isinstance(value, dict) else EventIds("", "")


def find_ids(item: dict[str, Any]) -> EventIds:
    """Return the ids of an event that is parsed JSON."""
    attributes = item.get(_ATTRIBUTES)
    anonymous = item.get(ANONYMOUS_ID)
    if anonymous is None and isinstance(attributes, dict):
        anonymous = attributes.get(ANONYMOUS_ID)
    return EventIds(_spell(item.get(_USER_ID)), _spell(anonymous))


def _spell(value: Any) -> str:
    """Return an id as a text, also if it was sent as a number."""
    if isinstance(value, str):
        return value.replace("\0", REPLACEMENT)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return ""
    if isinstance(value, float) and not (math.isfinite(value) and value.is_integer()):
        return str(float(value))
    return str(int(value)) if value == int(value) else str(value)


def _is_number(text: str) -> bool:
    """Return whether an event may have this id as a number, which has no text in protobuf."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _loosen(field: FieldDescriptorProto) -> None:
    """Make a text or a message bytes, which any bytes can be read as; its parts are kept apart."""
    if field.type == field.TYPE_STRING:
        field.type = field.TYPE_BYTES
    elif field.type == field.TYPE_MESSAGE:
        field.type = field.TYPE_BYTES
        field.label = field.LABEL_REPEATED
        field.ClearField("type_name")


_LooseEvent: Any = derive_message(Event, "ids", _loosen)


def _read_protobuf(event: bytes) -> EventIds:
    try:
        loose = _LooseEvent.FromString(event)
    except DecodeError:
        return _UNREADABLE
    user = _spell(loose.user_id.decode(errors="replace"))
    return EventIds(user, _read_anonymous(loose.attributes))


def _read_anonymous(parts: Sequence[bytes]) -> str | None:
    try:
        fields = Struct.FromString(b"".join(parts)).fields  # parts of a message are merged
    except DecodeError:
        return None
    return _spell_value(fields[ANONYMOUS_ID]) if ANONYMOUS_ID in fields else ""


def _spell_value(value: Value) -> str:
    if value.WhichOneof("kind") == "number_value":
        return _spell(value.number_value)
    return _spell(value.string_value)


class RowIds:
    """Reads the ids off rows whose cells are these columns."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._user = columns.index("user_id")
        self._attributes = columns.index(EVENT_SCHEMA.catch_all.name)

    def read(self, row: Row) -> EventIds:
        """Return the ids of an event that is to be stored."""
        cells = split_cells(row.text)
        attributes = cells[self._attributes]
        if ANONYMOUS_ID not in attributes:
            return EventIds(cells[self._user], "")
        return EventIds(cells[self._user], _spell(orjson.loads(attributes).get(ANONYMOUS_ID)))


# A text this long is hidden wherever it stands; a shorter one may be a part of any word.
_TELLING_CHARACTERS = 8


def hide_ids(text: str, person: Person) -> str:
    """Return a text, such as a provider's answer, without the ids of a person that it names."""
    for wanted in texts_naming(person):
        text = text.replace(wanted, '"…"' if wanted.startswith('"') else "…")
    return text


def blot_ids(text: str, person: Person) -> str:
    """Return a text without the ids of a person, however short they are and wherever they stand."""
    spelled = {spelling for each in person.ids for spelling in _spell_in_text(each)}
    for wanted in sorted(spelled, key=len, reverse=True):
        text = text.replace(wanted, "…")
    return text


def texts_naming(person: Person) -> list[str]:
    """Return the texts by which a provider's answer may name a person: short ids in quotes."""
    spelled = {spelling for each in person.ids for spelling in _spell_in_text(each)}
    long = {each for each in spelled if len(each) >= _TELLING_CHARACTERS}
    return [*sorted(long, key=len, reverse=True), *(f'"{each}"' for each in spelled - long)]


def _spell_in_text(text: str) -> list[str]:
    """Return an id as a text may have it: as it is, or escaped as JSON does it."""
    escaped = orjson.dumps(text).decode()[1:-1]
    return [text, escaped, json.dumps(text)[1:-1]]
