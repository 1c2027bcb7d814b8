"""The rules of the schema, applied to one event in the order of its fields."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from operator import itemgetter

from google.protobuf.message import Message

from productgraph.v1.event_pb2 import Event
from server.events.parsed import MalformedEvent, ParsedEvent
from server.events.problems import (
    NOT_A_TIMESTAMP,
    REQUIRED,
    WRONG_PROJECT,
    Fault,
    InvalidEvent,
    Problem,
    Reason,
)
from server.events.schema import Field, Kind, Schema
from server.events.text_rules import TextRules
from server.events.timestamps import is_storable

MAX_QUOTED_CHARACTERS = 64
# How many names are looked through for one that is misspelt.
_MAX_NAMES = 100


class Validator:
    """Checks events against the rules of one schema."""

    def __init__(self, schema: Schema) -> None:
        self._fields = schema.fields
        self._catch_all = schema.catch_all
        self._rules = TextRules(schema)
        self._ruled = itemgetter(*map(schema.columns.index, self._rules.fields))
        self._timestamps = [field.name for field in schema.of_kind(Kind.TIMESTAMP)]

    def check_event(self, parsed: ParsedEvent, project_id: str) -> None:
        """Raise InvalidEvent for the first rule that a field of the event breaks."""
        if not self._looks_valid(parsed.event, parsed.columns, project_id):
            problem = self._find_problem(parsed.event, project_id, self._fields)
            if problem is not None:
                unnamed = getattr(parsed.event, self._catch_all.name).fields
                raise InvalidEvent(_explain(problem, unnamed))

    def explain_malformed(self, malformed: MalformedEvent, project_id: str) -> Problem:
        """Return the first problem of an event that could not be read in full."""
        before = self._fields[: malformed.position]
        problem = self._find_problem(malformed.event, project_id, before)
        return _explain(problem, malformed.unnamed) if problem else malformed.problem

    def _looks_valid(self, event: Message, columns: Sequence[str], project_id: str) -> bool:
        """Check all rules at once, by a few operations in C; a valid event may still fail."""
        if not self._rules.are_plainly_kept(self._ruled(columns), project_id):
            return False
        for name in self._timestamps:
            if not (event.HasField(name) and is_storable(getattr(event, name))):
                return False
        return True

    def _find_problem(
        self, event: Event, project_id: str, fields: Iterable[Field]
    ) -> Problem | None:
        for field in fields:
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
        text = f"unknown {noun} {quote(value)}{_suggest(value, tuple(rules.allowed_values))}"
        return Fault(Reason.UNKNOWN_VALUE, text)
    return None


def _suggest(value: str, allowed: tuple[str, ...]) -> str:
    """Return the allowed value that is meant, or all of them if none is near."""
    near = _spellings_of(allowed)
    for spelling in _misspell(value[:MAX_QUOTED_CHARACTERS]):
        if spelling in near:
            return f", did you mean {quote(near[spelling])}?"
    return f", must be one of {', '.join(allowed)}"


@lru_cache
def _spellings_of(allowed: tuple[str, ...]) -> dict[str, str]:
    """Return each value by its spellings, with and without what stands before its dot."""
    meant = {value: value for value in allowed}
    for value in allowed:
        for part in (value, value.rpartition(".")[2]):
            for spelling in _misspell(part):
                meant.setdefault(spelling, value)
    return meant


def _misspell(text: str) -> Iterable[str]:
    """Yield the letters of a text, then those with one left out.

    Two texts that differ by one letter (added, left out, another, or swapped) share one of them.
    """
    letters = _letters_of(text)
    yield letters
    for place in range(len(letters)):
        yield letters[:place] + letters[place + 1 :]


def _letters_of(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _explain(problem: Problem, unnamed: Iterable[str]) -> Problem:
    """Say of a missing field under which other spelling of its name it was sent."""
    if problem.reason is not Reason.REQUIRED:
        return problem
    letters = _letters_of(problem.field)
    for name in islice(unnamed, _MAX_NAMES):
        if _letters_of(name[:MAX_QUOTED_CHARACTERS]) == letters:
            return problem._replace(text=f"required, but {quote(name)} was sent")
    return problem


def quote(value: str) -> str:
    """Quote a client's value for an error text: cut short, and on one line."""
    text = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in value[:MAX_QUOTED_CHARACTERS]
    )
    return f"'{text}'" + ("…" if len(value) > MAX_QUOTED_CHARACTERS else "")
