"""The rules of the schema, applied to one event in the order of its fields."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from google.protobuf.message import Message

from productgraph.v1 import rules_pb2
from productgraph.v1.event_pb2 import Event
from server.events.problems import (
    NOT_A_TIMESTAMP,
    REQUIRED,
    WRONG_PROJECT,
    Fault,
    InvalidEvent,
    Problem,
    Reason,
    report_excess,
)
from server.events.schema import Field, Kind, Schema
from server.events.timestamps import is_storable

MAX_QUOTED_CHARACTERS = 64
# An event's protobuf takes at most this many bytes for each character of its line of COPY. Arrays
# of digits grow most, two characters to eleven bytes; a character of a text takes up to four.
MAX_BYTES_PER_CHARACTER = 8


@dataclass(frozen=True)
class MalformedEvent:
    """What could be read of an event before a field whose value is unreadable.

    `position` is that field's place in the schema; 0 if the whole cannot be read, with an empty
    `event`.
    """

    event: Event
    position: int
    problem: Problem


class Validator:
    """Checks events against the rules of one schema."""

    def __init__(self, schema: Schema) -> None:
        self._fields = schema.fields
        self._max_bytes = schema.max_bytes
        texts = schema.of_kind(Kind.TEXT)
        # Texts with rules, all read at once: required ones first, the project before all others.
        ruled = [field for field in texts if field.rules != rules_pb2.FieldRules()]
        ruled.sort(key=lambda field: (not field.rules.matches_api_key, not field.rules.required))
        self._ruled = itemgetter(*map(schema.columns.index, ruled))
        self._required_count = sum(field.rules.required for field in ruled)
        # A text of so few characters keeps every limit in bytes of UTF-8.
        self._safe_length = min(f.rules.max_bytes for f in ruled if f.rules.max_bytes) // 4
        self._choices = [
            (ruled.index(field), frozenset(field.rules.allowed_values))
            for field in ruled
            if field.rules.allowed_values
        ]
        self._timestamps = [field.name for field in schema.of_kind(Kind.TIMESTAMP)]

    def check_event(self, event: Event, columns: Sequence[str], project_id: str) -> None:
        """Raise InvalidEvent for the first rule that a field of the event breaks.

        `columns` has its texts too, in the order of `Schema.columns`.
        """
        if not self._looks_valid(event, columns, project_id):
            problem = self._find_problem(event, project_id, len(self._fields))
            if problem is not None:
                raise InvalidEvent(problem)

    def surely_fits(self, size: int, line_length: int) -> bool:
        """Tell whether an event is small enough, by its size as protobuf or as a line of COPY."""
        return (size or line_length * MAX_BYTES_PER_CHARACTER) <= self._max_bytes

    def check_size(self, size: int) -> None:
        """Raise InvalidEvent for an encoded event of too many bytes."""
        if size > self._max_bytes:
            raise InvalidEvent(report_excess(self._max_bytes))

    def explain_malformed(self, malformed: MalformedEvent, project_id: str) -> Problem:
        """Return the first problem of an event that could not be read in full."""
        before = self._find_problem(malformed.event, project_id, malformed.position)
        return before or malformed.problem

    def _looks_valid(self, event: Message, columns: Sequence[str], project_id: str) -> bool:
        """Check all rules at once, by a few operations in C; a valid event may still fail."""
        texts = self._ruled(columns)
        if texts[0] != project_id or "" in texts[: self._required_count]:
            return False
        if max(map(len, texts)) > self._safe_length:
            return False
        for index, allowed in self._choices:
            if texts[index] not in allowed:
                return False
        for name in self._timestamps:
            if not (event.HasField(name) and is_storable(getattr(event, name))):
                return False
        return True

    def _find_problem(self, event: Event, project_id: str, end: int) -> Problem | None:
        for field in self._fields[:end]:
            if fault := _check_field(event, field, project_id):
                return Problem(field.wire_name, *fault)
        return None


def _check_field(event: Message, field: Field, project_id: str) -> Fault | None:
    value = getattr(event, field.name)
    if field.kind is Kind.TEXT:
        return _check_text(value, field, project_id)
    present = event.HasField(field.name)
    if field.rules.required and not present:
        return REQUIRED
    if field.kind is Kind.TIMESTAMP and present and not is_storable(value):
        return NOT_A_TIMESTAMP
    return None


def _check_text(value: str, field: Field, project_id: str) -> Fault | None:
    rules = field.rules
    if not value:
        return REQUIRED if rules.required else None
    if rules.max_bytes and len(value.encode()) > rules.max_bytes:
        return Fault(Reason.TOO_LONG, f"longer than {rules.max_bytes} bytes")
    if rules.matches_api_key and value != project_id:
        return WRONG_PROJECT
    if rules.allowed_values and value not in rules.allowed_values:
        noun = field.wire_name.rpartition(".")[2]
        return Fault(Reason.UNKNOWN_VALUE, f"unknown {noun} {quote(value)}")
    return None


def quote(value: str) -> str:
    """Quote a client's value for an error text: cut short, and on one line."""
    text = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in value[:MAX_QUOTED_CHARACTERS]
    )
    return f"'{text}'" + ("…" if len(value) > MAX_QUOTED_CHARACTERS else "")
