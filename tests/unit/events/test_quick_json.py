"""The quick way from JSON to rows and the careful one agree on whatever is sent."""

import json
import sys
from collections.abc import Iterator
from typing import cast

import orjson
import pytest

from productgraph.v1.event_pb2 import Event
from server.events.batch import ReadEvent
from server.events.copy_rows import Row, RowEncoder
from server.events.json_codec import _BYTES_PER_CHARACTER, JsonCodec
from server.events.json_parser import parse_document
from server.events.parsed import MalformedEvent, ParsedEvent
from server.events.problems import InvalidEvent, Problem
from server.events.quick_json import QuickReader, find_special
from server.events.schema import EVENT_SCHEMA
from server.events.timestamps import truncate_timestamp
from server.events.validation import Validator
from tests.bench.events import KINDS
from tests.support.random_events import COUNT, PROJECT, RandomEvents, sort_entries

BATCH = 10


class Ways:
    """Reads bodies both ways."""

    def __init__(self, *, keep_encoded: bool) -> None:
        columns = RowEncoder(EVENT_SCHEMA).columns
        self._quick = QuickReader(EVENT_SCHEMA, columns, keep_encoded=keep_encoded)
        self._codec = JsonCodec(EVENT_SCHEMA)
        self._validator = Validator(EVENT_SCHEMA)
        self._rows = RowEncoder(EVENT_SCHEMA)
        self._keep_encoded = keep_encoded

    def read_quickly(self, body: bytes) -> list[Row | None]:
        """Return the rows of the events that are plainly valid."""
        special = find_special(body)
        items = parse_document(body).value["events"]
        return [self._quick.read(item, PROJECT, special) for item in items]

    def read_carefully(self, body: bytes) -> Iterator[Row | Problem]:
        """Return the rows of the events that are valid, and the problems of the others."""
        batch = self._codec.parse_batch(body)
        for parsed in batch.events:
            try:
                yield self._check(parsed)
            except InvalidEvent as invalid:
                yield invalid.problem

    def _check(self, parsed: ReadEvent) -> Row:
        if isinstance(parsed, MalformedEvent):
            raise InvalidEvent(self._validator.explain_malformed(parsed, PROJECT))
        assert isinstance(parsed, ParsedEvent)
        self._validator.check_event(parsed, PROJECT)
        row = self._rows.encode(parsed)
        if not self._keep_encoded:
            return row
        truncate_timestamp(parsed.event.event_timestamp)
        return row._replace(encoded=parsed.event.SerializeToString(deterministic=True))


@pytest.mark.parametrize("keep_encoded", [False, True])
def test_both_ways_from_json_make_the_same_row(keep_encoded: bool) -> None:
    """An event that takes the quick way has the row that the careful way makes.

    To the byte, except that the entries of an object may be in another order.
    """
    events, ways = RandomEvents(seed=keep_encoded), Ways(keep_encoded=keep_encoded)
    quick_count = 0
    for _ in range(COUNT // BATCH):
        body = json.dumps({"events": [events.make() for _ in range(BATCH)]}).encode()
        quick, careful = ways.read_quickly(body), list(ways.read_carefully(body))
        for row, other in zip(quick, careful, strict=True):
            if row is not None:
                quick_count += 1
                assert sort_entries(row) == sort_entries(cast(Row, other))
    share = quick_count / COUNT
    assert 0.2 < share < 0.8, "too few events take one of the ways to compare them"
    sys.stdout.write(f"{COUNT} events, {share:.0%} of them the quick way\n")


@pytest.mark.parametrize("kind", ["usual", "dirty"])
def test_events_of_real_sdks_take_the_quick_way(kind: str) -> None:
    """Nulls, unnamed fields, metadata and escapes do not send an event to the careful way."""
    events = [event | {"project_id": PROJECT} for event in KINDS[kind](20)]
    body = json.dumps({"events": events}).encode()
    assert all(Ways(keep_encoded=False).read_quickly(body))


def test_new_names_in_every_event_take_no_memory() -> None:
    """What is remembered of a client's names is bounded, in number and in size."""
    ways = Ways(keep_encoded=False)
    for number in range(3000):
        ways.read_quickly(json.dumps({"events": [VALID | {f"name {number}": 1}]}).encode())
    assert ways.read_quickly(json.dumps({"events": [VALID | {"n" * 5000: 1}]}).encode()) == [None]
    assert len(ways._quick._layouts) <= 1000


def test_json_that_is_not_measured_fits_for_sure() -> None:
    """An event whose JSON is much larger than its row is no larger than allowed."""
    nulls = {f"{number:02}" + "\x02" * 39: None for number in range(94)}
    event = VALID | nulls | {"page.title": "\x02" * 12_620}
    body = orjson.dumps({"events": [event]})
    [row] = Ways(keep_encoded=False).read_quickly(body)
    assert row is not None
    bounds = [_BYTES_PER_CHARACTER * length for length in (len(row.text), len(row.text) + 100)]
    assert bounds[0] <= EVENT_SCHEMA.max_bytes < bounds[1]
    assert len(orjson.dumps(event)) <= EVENT_SCHEMA.max_bytes


VALID = {
    "event_id": "evt_1",
    "project_id": PROJECT,
    "session.id": "sess_1",
    "event.type": "custom",
    "event.timestamp": "2026-01-15T10:30:00Z",
}


@pytest.mark.parametrize(
    ("number", "stored"),
    [(0.5, 1), (-0.5, -1), (1.49, 1), (2.5, 3), (0.49999999999999994, 0), (-0.0, 0), (123.4, 123)],
)
def test_fractions_of_durations_are_rounded_on_the_quick_way(number: float, stored: int) -> None:
    """A fraction is rounded to the nearest integer, halves away from zero."""
    [row] = Ways(keep_encoded=True).read_quickly(
        json.dumps({"events": [VALID | {"duration_ms": number}]}).encode()
    )
    assert row is not None
    assert Event.FromString(row.encoded).duration_ms == stored
