"""The rules of the schema, applied to one event: the first that it breaks, in schema order."""

from dataclasses import dataclass
from operator import attrgetter

from google.protobuf.message import Message

from productgraph.v1.event_pb2 import Event
from server.schema import Field, Kind, Schema
from server.timestamps import is_storable

MAX_QUOTED_CHARACTERS = 64
NOT_AN_EVENT = "event: must be an object"
NOT_A_TIMESTAMP = "must be an ISO 8601 date-time"


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
        limited = [field for field in texts if field.rules.max_bytes]
        self._required = attrgetter(*(field.name for field in texts if field.rules.required))
        self._limited = attrgetter(*(field.name for field in limited))
        # A text of so few characters keeps every limit in bytes of UTF-8.
        self._safe_length = min(field.rules.max_bytes for field in limited) // 4
        self._choices = [
            (attrgetter(field.name), frozenset(field.rules.allowed_values))
            for field in texts
            if field.rules.allowed_values
        ]
        [project] = [field for field in texts if field.rules.matches_api_key]
        self._project = attrgetter(project.name)
        self._timestamps = schema.of_kind(Kind.TIMESTAMP)

    def check_event(self, event: Event, project_id: str) -> None:
        """Raises InvalidEvent for the first rule that a field of the event breaks."""
        if not self._looks_valid(event, project_id):
            problem = self._find_problem(event, project_id, len(self._fields))
            if problem is not None:
                raise InvalidEvent(problem)

    def check_size(self, size: int) -> None:
        """Raises InvalidEvent for an encoded event of too many bytes."""
        if size > self._max_bytes:
            raise InvalidEvent(f"event: larger than {self._max_bytes} bytes")

    def explain_malformed(self, malformed: MalformedEvent, project_id: str) -> str:
        """The first problem of an event that an edge could not read in full."""
        before = self._find_problem(malformed.event, project_id, malformed.position)
        return before or malformed.problem

    def _looks_valid(self, event: Event, project_id: str) -> bool:
        """All rules at once, by a few operations in C; False may still be a valid event."""
        return (
            self._project(event) == project_id
            and "" not in self._required(event)
            and max(map(len, self._limited(event))) <= self._safe_length
            and all(choice(event) in allowed for choice, allowed in self._choices)
            and all(self._keeps_time(event, field) for field in self._timestamps)
        )

    @staticmethod
    def _keeps_time(event: Message, field: Field) -> bool:
        return event.HasField(field.name) and is_storable(getattr(event, field.name))

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
