"""The quick way from protobuf to rows and the careful one agree on whatever is sent."""

import json
import sys
from random import Random
from typing import Any, cast

import pytest

from server.events.copy_rows import Row, RowEncoder
from server.events.json_codec import JsonCodec
from server.events.parsed import MalformedEvent, ParsedEvent
from server.events.problems import InvalidEvent, Problem
from server.events.protobuf_codec import ProtobufCodec
from server.events.quick_protobuf import QuickProtobufReader
from server.events.schema import EVENT_SCHEMA
from server.events.timestamps import truncate_timestamp
from server.events.validation import Validator
from tests.bench.events import KINDS
from tests.support.clients import encode_request
from tests.support.events import make_message, to_message
from tests.support.random_events import COUNT, PROJECT, RandomEvents, sort_entries

JSON_CODEC, PROTOBUF_CODEC = JsonCodec(EVENT_SCHEMA), ProtobufCodec(EVENT_SCHEMA)
VALIDATOR, ROWS = Validator(EVENT_SCHEMA), RowEncoder(EVENT_SCHEMA)
QUICK = QuickProtobufReader(EVENT_SCHEMA, keep_encoded=True)


def encode(event: Any) -> bytes:
    """Return the protobuf of an event that was sent as JSON, as far as it can be read."""
    [parsed] = JSON_CODEC.parse_batch(json.dumps({"events": [event]}).encode()).events
    assert isinstance(parsed, ParsedEvent | MalformedEvent)
    return parsed.event.SerializeToString()


def read_carefully(encoded: bytes) -> Row | Problem:
    """Return the row of an event with its protobuf, or its problem."""
    [parsed] = PROTOBUF_CODEC.parse_batch(encode_request([encoded])).events
    try:
        if isinstance(parsed, MalformedEvent):
            raise InvalidEvent(VALIDATOR.explain_malformed(parsed, PROJECT))
        assert isinstance(parsed, ParsedEvent)
        VALIDATOR.check_event(parsed, PROJECT)
    except InvalidEvent as invalid:
        return invalid.problem
    row = ROWS.encode(parsed)
    truncate_timestamp(parsed.event.event_timestamp)
    return row._replace(encoded=parsed.event.SerializeToString())


class Spoiler:
    """Changes the bytes of some events."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        parts = [
            to_message({"user.id": ""}),
            to_message({"event.sequence": 0, "page.title": "\0"}),
            to_message({"metadata": {"again": 1}}),
            to_message({"attributes": {"list": [1, "", None, {"k": [[]]}], "wide": "x" * 200}}),
        ]
        self._parts = [part.SerializeToString() for part in parts]

    def spoil(self, encoded: bytes) -> bytes:
        """Return an event as it is, with one more part, or with other bytes somewhere."""
        draw = self._random
        kind, place = draw.randrange(6), draw.randrange(len(encoded) + 1)
        if kind == 0:
            return encoded + draw.choice(self._parts)
        if kind == 1:
            return encoded[:place] + draw.randbytes(draw.randrange(3)) + encoded[place + 1 :]
        return encoded


@pytest.mark.parametrize("seed", range(2))
def test_both_ways_from_protobuf_make_the_same_row(seed: int) -> None:
    """An event over gRPC has the same row by the quick way as by the careful one.

    To the byte, except that the entries of an object may be in another order.
    """
    events, spoiler = RandomEvents(seed), Spoiler(seed)
    quick_count = 0
    for _ in range(COUNT // 2):
        encoded = spoiler.spoil(encode(events.make()))
        if (row := QUICK.read(encoded, PROJECT)) is not None:
            quick_count += 1
            assert sort_entries(row) == sort_entries(cast(Row, read_carefully(encoded)))
    share = quick_count / (COUNT // 2)
    assert 0.2 < share < 0.8, "too few events take one of the ways to compare them"
    sys.stdout.write(f"{COUNT // 2} events, {share:.0%} of them the quick way\n")


@pytest.mark.parametrize("kind", ["usual", "dirty", "long"])
def test_events_of_grpc_clients_take_the_quick_way(kind: str) -> None:
    """Objects, escapes, long and empty texts and zeros do not send an event to the careful way."""
    empty = {"project_id": PROJECT, "user.id": "", "event.sequence": 0, "duration_ms": 0}
    for event in KINDS[kind](20):
        for changes in ({"project_id": PROJECT}, empty, empty | {"metadata": {}}):
            encoded = encode(event | changes)
            row = QUICK.read(encoded, PROJECT)
            assert row is not None
            assert sort_entries(row) == sort_entries(cast(Row, read_carefully(encoded)))


@pytest.mark.parametrize("levels", [31, 32, 33])
def test_the_quick_way_leaves_what_nests_too_deep(levels: int) -> None:
    """An object of 32 levels is read, and what is deeper is left to be rejected by name."""
    for inner in ({"k": 1}, [1]):
        nested: Any = inner
        for _ in range(levels - 2):
            nested = {"k": nested}
        encoded = make_message(PROJECT, "evt", metadata={"k": nested}).SerializeToString()
        row = QUICK.read(encoded, PROJECT)
        assert (row is not None) is (levels <= 32)
        assert row is None or row == read_carefully(encoded)
