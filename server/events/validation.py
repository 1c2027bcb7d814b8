"""The rules of the schema, applied to one event: the first that it breaks, in schema order."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from google.protobuf.message import Message

from productgraph.v1 import rules_pb2
from productgraph.v1.event_pb2 import Event
from server.events.schema import Field, Kind, Schema
from server.events.timestamps import is_storable

MAX_QUOTED_CHARACTERS = 64
# Of an event's protobuf, by its line of COPY. Arrays of digits grow most, two characters to eleven
# bytes; of other texts a character takes up to four.
MAX_BYTES_PER_CHARACTER = 8
NOT_AN_EVENT = "event: must be an object"
NOT_A_TIMESTAMP = "must be an ISO 8601 date-time"


# What problems are counted as, by how they begin.
_REASONS = {
    "required": "required",
    "unknown ": "unknown_value",
    "longer than ": "too_long",
    "larger than ": "too_large",
    "nested more than ": "too_deep",
    "does not match ": "wrong_project",
    NOT_A_TIMESTAMP: "invalid_timestamp",
    "must be valid UTF-8": "invalid_encoding",
    "must be an integer of ": "out_of_range",
    "must be ": "wrong_type",
}
UNCLASSIFIED = "other"
REASONS = (*_REASONS.values(), UNCLASSIFIED)


class InvalidEvent(Exception):
    """One event cannot be accepted; the text is `<documented field name>: <problem>`."""


@dataclass(frozen=True)
class MalformedEvent:
    """What an edge could read of an event one of whose fields has an unreadable value.

    `position` is that field's place in the schema; 0, with an empty `event`, where the whole
    cannot be read. `problem` is complete, the field's name included.
    """

    event: Event
    position: int
    problem: str


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
        """Raises InvalidEvent for the first rule that a field of the event breaks.

        `columns` has its texts too, in the order of `Schema.columns`.
        """
        if not self._looks_valid(event, columns, project_id):
            problem = self._find_problem(event, project_id, len(self._fields))
            if problem is not None:
                raise InvalidEvent(problem)

    def surely_fits(self, size: int, line_length: int) -> bool:
        """Whether an event is small enough, by what it took as protobuf or as a line of COPY."""
        return (size or line_length * MAX_BYTES_PER_CHARACTER) <= self._max_bytes

    def check_size(self, size: int) -> None:
        """Raises InvalidEvent for an encoded event of too many bytes."""
        if size > self._max_bytes:
            raise InvalidEvent(describe_excess(self._max_bytes))

    def explain_malformed(self, malformed: MalformedEvent, project_id: str) -> str:
        """The first problem of an event that an edge could not read in full."""
        before = self._find_problem(malformed.event, project_id, malformed.position)
        return before or malformed.problem

    def _looks_valid(self, event: Message, columns: Sequence[str], project_id: str) -> bool:
        """All rules at once, by a few operations in C; False may still be a valid event."""
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

    def _find_problem(self, event: Event, project_id: str, end: int) -> str | None:
        for field in self._fields[:end]:
            if problem := _check_field(event, field, project_id):
                return f"{field.wire_name}: {problem}"
        return None


def _check_field(event: Message, field: Field, project_id: str) -> str | None:
    value = getattr(event, field.name)
    if field.kind is Kind.TEXT:
        return _check_text(value, field, project_id)
    present = event.HasField(field.name)
    if field.rules.required and not present:
        return "required"
    if field.kind is Kind.TIMESTAMP and present and not is_storable(value):
        return NOT_A_TIMESTAMP
    return None


def _check_text(value: str, field: Field, project_id: str) -> str | None:
    rules = field.rules
    if not value:
        return "required" if rules.required else None
    if rules.max_bytes and len(value.encode()) > rules.max_bytes:
        return f"longer than {rules.max_bytes} bytes"
    if rules.matches_api_key and value != project_id:
        return "does not match the API key"
    if rules.allowed_values and value not in rules.allowed_values:
        return f"unknown {field.wire_name.rpartition('.')[2]} {quote(value)}"
    return None


def classify_problem(text: str) -> tuple[str, str]:
    """The field (or `event`) of a problem, and which of `REASONS` it is; nothing of a client's."""
    field, _, problem = text.partition(": ")
    reasons = (reason for start, reason in _REASONS.items() if problem.startswith(start))
    return field, next(reasons, UNCLASSIFIED)


def describe_excess(max_bytes: int) -> str:
    """The problem of an event whose protobuf encoding has more than `max_bytes` bytes."""
    return f"event: larger than {max_bytes} bytes"


def describe_nesting(max_depth: int) -> str:
    """The problem of a field whose objects and arrays nest deeper than `max_depth` levels."""
    return f"nested more than {max_depth} levels deep"


def quote(value: str) -> str:
    """A value of a client's for an error text: cut short, and on one line."""
    text = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in value[:MAX_QUOTED_CHARACTERS]
    )
    return f"'{text}'" + ("…" if len(value) > MAX_QUOTED_CHARACTERS else "")
