"""Redaction on the way in: fields dropped, hashed, or freed of a URL's query, by their names.

It runs after the checks of an event's size, and before anything keeps or shows the event.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import orjson
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct

from productgraph.v1.event_pb2 import Event
from server.events.free_form import REPLACEMENT, TooDeep, fill_struct, read_struct
from server.events.json_parser import encode_document
from server.events.persons import ANONYMOUS_ID
from server.events.problems import NOT_UTF8
from server.events.schema import EVENT_SCHEMA, Field, Kind
from server.values import DROP, HASH, NO_QUERY

_METADATA = "metadata"
_FIELDS = {field.wire_name: field for field in EVENT_SCHEMA.fields}
_CATCH_ALL = EVENT_SCHEMA.catch_all
# Replaces a value that should have been a text, so that validation still rejects it.
_NOTHING: dict[str, Any] = {}


class RedactionRule(NamedTuple):
    """The action for a field, by its name on the wire, or for a key of metadata."""

    name: str
    action: str


def find_fault(rule: RedactionRule) -> str | None:
    """Return why a rule cannot be followed, or None if it can."""
    field = _FIELDS.get(rule.name)
    if rule.name == ANONYMOUS_ID or (field is not None and _is_needed(field)):
        return f"{rule.name} is an id or required, and stays as it is"
    if field is not None and field.kind is not Kind.TEXT and rule.action != DROP:
        return f"{rule.name} is no text, and can only be dropped"
    return None


def _is_needed(field: Field) -> bool:
    return field.rules.required or field.wire_name.endswith((".id", "_id"))


class Redactor:
    """Follows rules; `hash_text` returns what a text is replaced by."""

    def __init__(self, rules: Sequence[RedactionRule], hash_text: Callable[[str], str]) -> None:
        self._hash_text = hash_text
        prefix = f"{_METADATA}."
        self._in_metadata = [
            (rule.name.removeprefix(prefix), rule.action)
            for rule in rules
            if rule.name.startswith(prefix)
        ]
        self._rules = [(rule.name, rule.action) for rule in rules]
        self._named = [(_FIELDS[rule.name], rule.action) for rule in rules if rule.name in _FIELDS]

    def redact_item(self, item: Any) -> None:
        """Redact an event that is parsed JSON, in place."""
        if not isinstance(item, dict):
            return
        for name, action in self._rules:
            if item.get(name) is not None:
                self._redact_entry(item, name, action, is_text=name in _FIELDS)
        for container, rules in (
            (item.get(_METADATA), self._in_metadata),
            (item.get(_CATCH_ALL.wire_name), self._rules),
        ):
            if isinstance(container, dict):
                for name, action in rules:
                    if container.get(name) is not None:
                        self._redact_entry(container, name, action, is_text=False)

    def _redact_entry(
        self, container: MutableMapping[str, Any], name: str, action: str, *, is_text: bool
    ) -> None:
        value = container[name]
        if value is NOT_UTF8:
            return  # it is refused, and not quoted
        if action == DROP:
            del container[name]
        elif isinstance(value, str):
            container[name] = self._replace(value, action)
        elif is_text:
            container[name] = _NOTHING
        elif action == NO_QUERY:
            del container[name]  # no URL, but it may hold some
        else:
            container[name] = self._replace(_spell(value), action)

    def _replace(self, text: str, action: str) -> str:
        if not text:
            return text
        if action == HASH:
            return self._hash_text(text.replace("\0", REPLACEMENT))
        return text.partition("#")[0].partition("?")[0]

    def redact_message(self, event: Message) -> None:
        """Redact an event that is a message, in place."""
        for field, action in self._named:
            if not event.HasField(field.name):
                continue
            if action == DROP:
                event.ClearField(field.name)
            else:
                text = self._replace(getattr(event, field.name), action)
                setattr(event, field.name, text)
        for name, rules in ((_METADATA, self._in_metadata), (_CATCH_ALL.name, self._rules)):
            if event.HasField(name):
                self._redact_struct(getattr(event, name), rules)

    def _redact_struct(self, struct: Struct, rules: Sequence[tuple[str, str]]) -> None:
        fields = struct.fields
        for name, action in rules:
            if name not in fields or fields[name].WhichOneof("kind") == "null_value":
                continue
            entry = {name: _read_entry(struct, name)}
            self._redact_entry(entry, name, action, is_text=False)
            del fields[name]
            fill_struct(struct, entry)

    def redact_frame(self, encoded: bytes) -> bytes | None:
        """Return an encoded event with everything redacted; None if it cannot be read."""
        try:
            event = Event.FromString(encoded)
        except DecodeError:
            return None
        self.redact_message(event)
        return event.SerializeToString()


def _read_entry(struct: Struct, name: str) -> Any:
    alone = Struct()
    alone.fields[name].CopyFrom(struct.fields[name])
    try:
        return read_struct(alone, EVENT_SCHEMA.max_depth)[name]
    except TooDeep:
        return ""


def _spell(value: Any) -> str:
    """Return a value that is no text as JSON, the same however it was sent."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError:
        return encode_document(value).decode()
