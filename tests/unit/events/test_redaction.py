"""Redaction takes the same out of events in every form, and their sizes are checked before."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.events.batch import ParsedBatch
from server.events.copy_rows import Row
from server.events.encoded_events_pb2 import EncodedEvents
from server.events.json_codec import JsonCodec
from server.events.parsed import MalformedEvent, ParsedEvent
from server.events.protobuf_codec import ProtobufCodec
from server.events.quick_json import QuickReader
from server.events.quick_protobuf import QuickProtobufReader
from server.events.redaction import RedactionRule, Redactor, find_fault
from server.events.schema import EVENT_SCHEMA
from tests.support.events import ENCODER, make_event, to_message

RULES = [
    RedactionRule("page.url", "no-query"),
    RedactionRule("page.title", "hash"),
    RedactionRule("error.stack", "drop"),
    RedactionRule("duration_ms", "drop"),
    RedactionRule("metadata.email", "hash"),
    RedactionRule("metadata.link", "no-query"),
    RedactionRule("plan.owner", "hash"),
    RedactionRule("plan.note", "drop"),
]
REDACTOR = Redactor(RULES, lambda text: f"#{len(text)}")
SECRET = "🔑secret"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
ANY = st.one_of(TEXT, st.integers(-1000, 1000), st.booleans(), st.lists(TEXT, max_size=2))
Codec = Callable[[bytes], ParsedBatch]


def read_json(event: dict[str, Any]) -> list[ParsedBatch]:
    """Return the batches of an event over HTTP: by the quick way, and by the careful one."""
    body = json.dumps({"events": [event]}).encode()
    quick = QuickReader(EVENT_SCHEMA, ENCODER.columns, keep_encoded=True)
    codecs = [JsonCodec(EVENT_SCHEMA, each, REDACTOR) for each in (quick, None)]
    return [codec.parse_batch(body, project_id="p") for codec in codecs]


def read_protobuf(event: dict[str, Any]) -> list[ParsedBatch]:
    """Return the batches of the same over gRPC, in both ways."""
    unnamed = {n: v for n, v in event.items() if n.startswith("plan.")}
    named = {n: v for n, v in event.items() if n not in unnamed}
    message = to_message(named | ({"attributes": unnamed} if unnamed else {}))
    request = EncodedEvents(events=[message.SerializeToString()]).SerializeToString()
    quick = QuickProtobufReader(EVENT_SCHEMA, keep_encoded=True)
    codecs = [ProtobufCodec(EVENT_SCHEMA, each, REDACTOR) for each in (quick, None)]
    return [codec.parse_batch(request, project_id="p") for codec in codecs]


def spell(batch: ParsedBatch) -> list[Any]:
    """Return the cells of the row that a batch's only event becomes, objects as values."""
    [event] = batch.events
    assert not isinstance(event, MalformedEvent), event.problem
    row = ENCODER.encode(event) if isinstance(event, ParsedEvent) else event
    assert isinstance(row, Row)
    cells = row.text[:-1].split("\t")
    return [json.loads(cell) if cell.startswith("{") else cell for cell in cells]


@given(TEXT, TEXT, st.dictionaries(st.sampled_from(["email", "link", "x"]), ANY), ANY)
def test_redaction_is_the_same_over_both_protocols(
    url: str, title: str, metadata: dict[str, Any], owner: Any
) -> None:
    """By the quick way and the careful one, over both protocols, an event becomes the same row."""
    fields = {"page.url": f"https://x/?{url}", "page.title": title, "error.stack": url}
    more = {"metadata": metadata, "plan.owner": owner, "plan.note": url, "duration_ms": 5}
    event = make_event("p", "e", fields | more)
    first, *others = [spell(batch) for batch in (*read_json(event), *read_protobuf(event))]
    assert all(other == first for other in others)
    assert "https://x/" in first
    assert "5" not in first


@pytest.mark.parametrize("read", [read_json, read_protobuf])
def test_nothing_redacted_is_left_anywhere(read: Callable[[Any], list[ParsedBatch]]) -> None:
    """Neither the row nor the protobuf, nor what would be kept of a rejected event, has it."""
    url = f"https://x/a?{SECRET}#{SECRET}"
    event = make_event(
        "p",
        "e",
        {
            "page.url": url,
            "page.title": SECRET,
            "error.stack": SECRET,
            "metadata": {"email": SECRET, "link": url, "kept": "here"},
            "plan.owner": [SECRET],
            "plan.note": {"deep": SECRET},
        },
    )
    for batch in read(event):
        kept = batch.received(0)
        assert kept is not None
        [parsed] = batch.events
        forms = [kept]
        if isinstance(parsed, Row):
            forms += [parsed.text.encode(), parsed.encoded]
        elif isinstance(parsed, ParsedEvent):
            forms += ["".join(parsed.columns).encode(), parsed.event.SerializeToString()]
        spellings = (SECRET.encode(), json.dumps(SECRET)[1:-1].encode())
        assert not [form for form in forms for each in spellings if each in form]
        assert all(b"here" in form for form in forms)


@pytest.mark.parametrize("read", [read_json, read_protobuf])
def test_sizes_are_checked_before_redaction(read: Callable[[Any], list[ParsedBatch]]) -> None:
    """An event that is too large is refused, even if what is dropped would make it small."""
    for batch in read(make_event("p", "e", {"error.stack": "x" * EVENT_SCHEMA.max_bytes})):
        [event] = batch.events
        assert isinstance(event, MalformedEvent)
        assert "larger" in event.problem.text or "bytes" in event.problem.text
        kept = batch.received(0)
        assert kept is not None
        assert b"xxx" not in kept


def test_what_cannot_be_read_is_not_kept() -> None:
    """What is no event of JSON or of protobuf cannot be redacted, and is not to be kept."""
    json_batch = JsonCodec(EVENT_SCHEMA, None, REDACTOR).parse_batch(b'{"events":["secret"]}')
    assert json_batch.received(0) is None
    request = EncodedEvents(events=[b"\xff\xff"]).SerializeToString()
    batch = ProtobufCodec(EVENT_SCHEMA, None, REDACTOR).parse_batch(request)
    assert batch.received(0) is None


@pytest.mark.parametrize(
    ("name", "action", "is_possible"),
    [
        *[(name, "drop", False) for name in ("event_id", "user.id", "session.id", "event.type")],
        *[("user.anonymous_id", "hash", False), ("gen_ai.journey.id", "hash", False)],
        *[("event.timestamp", "drop", False), ("duration_ms", "hash", False)],
        *[("metadata", "no-query", False), ("metadata", "drop", True)],
        *[("duration_ms", "drop", True), ("error.message", "hash", True)],
        *[("metadata.id", "hash", True), ("anything", "no-query", True)],
    ],
)
def test_ids_and_required_fields_cannot_be_redacted(
    name: str, action: str, is_possible: bool
) -> None:
    """Ids and required fields stay as they are, and what is no text can only be dropped."""
    assert (find_fault(RedactionRule(name, action)) is None) == is_possible
