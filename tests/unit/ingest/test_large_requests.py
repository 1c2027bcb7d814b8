"""Requests that are dear to read are refused before they are, or as soon as they are late."""

import json
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future
from typing import cast

import pytest

from productgraph.v1.event_pb2 import Event
from server.deadline import NEVER, Deadline
from server.errors import InvalidArgument, Unavailable
from server.events.batch import ParsedBatch
from server.events.copy_rows import RowEncoder
from server.events.json_codec import JsonCodec
from server.events.json_parser import MAX_VALUES, check_values, parse_document, parse_exactly
from server.events.parsed import MalformedEvent, ParsedEvent
from server.events.problems import NOT_AN_EVENT
from server.events.protobuf_codec import ProtobufCodec
from server.events.quick_json import QuickReader
from server.events.schema import EVENT_SCHEMA, MAX_REQUEST_BYTES
from server.ingest.admission import Admission
from server.ingest.group_commit import Writer
from server.ingest.ingestion import Ingestion
from server.ingest.service import IngestService
from tests.support.clients import encode_request
from tests.support.clock import Clock
from tests.support.events import to_message

TIMEOUT_SECONDS = 5.0
LARGE = 2 << 20


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"{}," * MAX_VALUES + b"{}]",
        b'{"events":[' + b"{}," * MAX_VALUES + b"{}]}",
        b'["\\u0000"' + b",0" * MAX_VALUES + b"]",
        b"[" * 5_000_000,
        b'{"a":' * 1_000_000,
    ],
    ids=["objects", "events", "numbers", "depth", "nested objects"],
)
def test_a_body_of_too_many_values_is_refused(body: bytes) -> None:
    """A body of more values than any batch needs is refused as a whole, whatever they are."""
    with pytest.raises(InvalidArgument, match=f"body: more than {MAX_VALUES} values"):
        check_values(body, NEVER)


def test_counting_values_takes_no_memory_for_texts() -> None:
    """The values of a body are counted without making anything of its many texts."""
    body = b'{"a":' * 2_000_000
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument):
            check_values(body, NEVER)
        assert tracemalloc.get_traced_memory()[1] < len(body)
    finally:
        tracemalloc.stop()


def test_punctuation_within_texts_is_no_value() -> None:
    """Commas and brackets within texts are no values."""
    texts = ["[,{" * 1_000_000, '\\"[,', "],"]
    body = json.dumps(texts).encode()
    check_values(body, NEVER)
    assert parse_document(body).value == texts


@pytest.mark.parametrize(
    "dense", [b'"," ', b'"a",', b'"\\",', b"[],", b"]", b'{"":', b"\\,", b'\\"'], ids=repr
)
def test_dense_bodies_are_read_or_refused_soon(dense: bytes) -> None:
    """Whatever 10 MB repeat, no more steps are taken in Python than there may be values."""
    body = b"[" + dense * (MAX_REQUEST_BYTES // len(dense))
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    sys.setprofile(count)
    try:
        with pytest.raises(InvalidArgument):
            JsonCodec(EVENT_SCHEMA).parse_batch(body)
    finally:
        sys.setprofile(None)
    assert steps < 5 * MAX_VALUES


def test_a_body_of_just_enough_values_is_read() -> None:
    """A body of just as many values is read."""
    body = b"[" + b"0," * (MAX_VALUES - 1) + b"0]"
    check_values(body, NEVER)
    assert len(parse_document(body).value) == MAX_VALUES


class Storage:
    """Stands in for the writer: all is stored at once."""

    needs_encoded = False

    def submit(self, *_: object) -> "Future[None]":
        """Return a future that is done."""
        stored: Future[None] = Future()
        stored.set_result(None)
        return stored


@pytest.fixture
def clock() -> Clock:
    """Return the clock of a test."""
    return Clock(100.0)


def test_deadline_counts_from_arrival(clock: Clock) -> None:
    """What a request has waited for its turn is gone from its time; its client may have less."""
    service = IngestService(
        cast(Admission, None),
        cast(Ingestion, None),
        {},
        timeout_seconds=TIMEOUT_SECONDS,
        clock=clock,
    )
    assert service.find_deadline().left() == TIMEOUT_SECONDS
    assert service.find_deadline(arrived_at=clock.now - 2).left() == TIMEOUT_SECONDS - 2
    assert service.find_deadline(seconds=1).left() == 1
    assert service.find_deadline(seconds=60).left() == TIMEOUT_SECONDS


def test_late_requests_are_refused_before_reading(clock: Clock) -> None:
    """A request is refused once there is no time left to read it: a large one earlier."""
    deadline = Deadline(clock.now + TIMEOUT_SECONDS, clock)
    clock.now = deadline.at - 0.5
    deadline.check(0.25)
    with pytest.raises(Unavailable):
        deadline.check(1.0)
    clock.now = deadline.at
    with pytest.raises(Unavailable):
        deadline.check()


def test_late_bodies_are_not_parsed(clock: Clock) -> None:
    """A body that takes longer to parse than is left is refused without being looked at."""
    body = b"[" + b"0," * MAX_VALUES + b"no JSON"
    codec, deadline = JsonCodec(EVENT_SCHEMA), Deadline(clock.now + 0.5, clock)
    with pytest.raises(Unavailable):
        codec.parse_batch(body, deadline)
    with pytest.raises(InvalidArgument):
        codec.parse_batch(body)


class RunningClock(Clock):
    """Goes on by a tenth of a second whenever it is looked at."""

    def __call__(self) -> float:
        """Return the time, in seconds."""
        self.now += 0.1
        return self.now


@pytest.mark.parametrize(
    "body",
    [b"[" + b'"",' * 600_000, b"[" + b'"",' * 300_000 + b"[" * 150_000],
    ids=["texts", "depth"],
)
def test_looking_through_a_body_ends_at_its_deadline(body: bytes) -> None:
    """A body of millions of texts is not looked through to its end if its time is over before."""
    clock = RunningClock(100.0)
    with pytest.raises(Unavailable):
        JsonCodec(EVENT_SCHEMA).parse_batch(body, Deadline(clock.now + 3, clock))
    assert clock.now < 100 + 3.5


def test_what_is_nested_too_deep_becomes_null() -> None:
    """Whichever parser reads a deep document, it is cut at the same depth."""
    for depth in (63, 64, 65, 200, 5_000, 100_000):
        document = parse_exactly(b"[" * depth + b"]" * depth).value
        levels = 0
        while document:
            document, levels = document[0], levels + 1
        assert (document, levels) == (([], 62) if depth == 63 else (None, 63))


def test_invalid_json_is_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no JSON is refused by a parser in C, and never read token by token."""
    monkeypatch.setattr("server.events.json_parser._BRACKET", None)
    for body in (b'","' * 100_000, b'{"a": [1, 2', b"NaN", b"\xff"):
        with pytest.raises(InvalidArgument, match="body: invalid JSON"):
            parse_document(body)


def test_reading_ends_at_the_deadline(clock: Clock) -> None:
    """A large batch whose time is over is not read to its end."""
    read: list[int] = []

    def parse() -> Iterator[ParsedEvent | MalformedEvent]:
        for number in range(10):
            clock.now += 1
            read.append(number)
            yield MalformedEvent(Event(), 0, NOT_AN_EVENT)

    batch = ParsedBatch("http", 10, LARGE, parse(), lambda _: b"")
    ingestion = Ingestion(EVENT_SCHEMA, cast(Writer, Storage()))
    with pytest.raises(Unavailable):
        ingestion.ingest("proj", batch, Deadline(clock.now + TIMEOUT_SECONDS, clock))
    assert len(read) == TIMEOUT_SECONDS


@pytest.mark.parametrize(
    ("body", "least"),
    [
        (b"[0,0,0]", 0.0),
        (b'["' + b"x" * 2 * MAX_VALUES + b'"]', 0.02),
        (b"[" + b"0," * (MAX_VALUES - 1) + b"0]", 2.5),
    ],
    ids=["small", "one text", "many values"],
)
def test_dear_bodies_need_more_time(clock: Clock, body: bytes, least: float) -> None:
    """Small bodies take no time, and large ones the more, the more values they have."""
    with pytest.raises(Unavailable):
        check_values(body, Deadline(clock.now + least, clock))
    check_values(body, Deadline(clock.now + least + 0.1, clock))
    assert least < TIMEOUT_SECONDS / 1.5


@pytest.mark.parametrize(
    "value", [[0] * 30_000, [[]] * 30_000, {"a": [10**25] * 30_000}, [{"b": {}}] * 15_000]
)
def test_an_event_of_too_much_json_is_refused(value: object) -> None:
    """An event with more JSON than it may have is refused by that, whatever is in it."""
    event = VALID | {"own": value, "filler": "x" * 99_999}
    assert ingest_over_http(event) == ["event: larger than 102400 bytes"]
    assert ingest_over_http(event | {"session.id": ""}) == ["session.id: required"]


VALID = {
    "event_id": "evt_1",
    "project_id": "proj",
    "session.id": "s",
    "event.type": "custom",
    "event.timestamp": "2024-01-15T10:30:00Z",
}


def ingest_over_http(*events: dict[str, object]) -> list[str]:
    """Return the errors of events that a client sends as JSON."""
    ingestion = Ingestion(EVENT_SCHEMA, cast(Writer, Storage()))
    body = json.dumps({"events": events}).encode()
    quick = QuickReader(EVENT_SCHEMA, RowEncoder(EVENT_SCHEMA).columns, keep_encoded=False)
    answers = [
        ingestion.ingest("proj", codec.parse_batch(body, NEVER, "proj"), NEVER).response
        for codec in (JsonCodec(EVENT_SCHEMA), JsonCodec(EVENT_SCHEMA, quick))
    ]
    assert answers[0] == answers[1]
    return [error.error for error in answers[0].errors]


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize(
    "filling",
    [
        {"v": [1] * 9_400},
        {"v": [1.0] * 9_400},
        {"v": [10**25] * 900},
        {"x" * 9_000: None},
        {"attributes": {"lost": "x" * 9_000}, "lost": ""},
        {"event.timestamp": "2024-01-15T10:30:00." + "0" * 9_000},
        {"page.title": "\x01\0\ud83d" * 5_000},
        {"event.sequence": "0" * 40, "page.title": "\U0001f600" * 9_000},
        {"page.title": "\x02" * 12_000} | {"\x02" * 43 + str(n): None for n in range(10, 98)},
    ],
    ids=[
        *("ones", "floats", "long integers", "null", "lost", "timestamp", "escapes", "emoji"),
        "escapes and nulls",
    ],
)
def test_an_event_over_http_has_the_size_of_its_json(filling: dict[str, object], over: int) -> None:
    """Exactly 102,400 bytes of JSON are accepted, whatever they would be as protobuf or a row."""
    event = VALID | filling | {"page.path": ""}
    written = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
    size = len(written.encode("utf-8", "surrogatepass")) + 3 * written.count("\ud83d")
    errors = ingest_over_http(event | {"page.path": "x" * (102_400 - size + over)})
    assert errors == (["event: larger than 102400 bytes"] if over > 0 else [])


def test_an_unreadable_field_is_reported_before_the_size() -> None:
    """A field that cannot be read is told before the size."""
    event = {"event_id": 7, "metadata": {"values": [0] * 60_000}}
    [parsed] = JsonCodec(EVENT_SCHEMA).parse_batch(json.dumps({"events": [event]}).encode()).events
    assert isinstance(parsed, MalformedEvent)
    assert str(parsed.problem) == "event_id: must be a string"


def test_an_oversized_message_is_refused_by_its_size() -> None:
    """An event over the limit is refused by its size, after the rules that come before that."""
    event = to_message({"event_id": "evt_1", "metadata": {"values": [0] * 20_000}})
    [parsed] = ProtobufCodec(EVENT_SCHEMA).parse_batch(encode_request([event])).events
    assert isinstance(parsed, MalformedEvent)
    assert str(parsed.problem) == "event: larger than 102400 bytes"
    assert parsed.event.event_id == "evt_1"
    assert parsed.position == len(EVENT_SCHEMA.fields)


def test_a_far_too_large_event_is_never_parsed() -> None:
    """An event of many times the limit is refused unseen."""
    [parsed] = ProtobufCodec(EVENT_SCHEMA).parse_batch(encode_request([b"x" * 1_000_000])).events
    assert isinstance(parsed, MalformedEvent)
    assert str(parsed.problem) == "event: larger than 102400 bytes"


def test_repeated_protobuf_fields_do_not_add_to_size() -> None:
    """An event is as large as what remains of it where fields are sent again and again."""
    event = to_message({"event_id": "evt_1", "page.title": "x" * 1000}).SerializeToString()
    [parsed] = ProtobufCodec(EVENT_SCHEMA).parse_batch(encode_request([event * 200])).events
    assert isinstance(parsed, ParsedEvent)
