"""The id of an event that was kept as it was received."""

import pytest

from productgraph.v1.event_pb2 import Event
from server.events.event_ids import read_event_id
from server.protocols import GRPC, HTTP


@pytest.mark.parametrize(
    ("protocol", "event", "event_id"),
    [
        (HTTP, b'{"event_id":"evt_1"}', "evt_1"),
        (HTTP, b'{"event_id":"\xc3\xa9"}', "\u00e9"),
        (HTTP, b'{"event_id":1}', None),
        (HTTP, b'{"event_id":""}', None),
        (HTTP, b'{"event_id":"evt_1"', None),
        (HTTP, b'{"event_id":"a\\u0000b"}', None),
        (HTTP, b"[]", None),
        (HTTP, b'{"event_id":"' + b"x" * 256 + b'"}', None),
        (GRPC, Event(event_id="evt_1").SerializeToString(), "evt_1"),
        (GRPC, Event(event_id="a\0b").SerializeToString(), None),
        (GRPC, Event(event_id="\u00e9" * 128).SerializeToString(), None),
        (GRPC, b"\xff", None),
        (GRPC, b"\x0a\x01\xff", None),
        (GRPC, b"", None),
    ],
)
def test_only_an_id_that_an_event_can_have_is_read(
    protocol: str, event: bytes, event_id: str | None
) -> None:
    """Whatever was kept of an event, it has an id that can be looked for, or none."""
    assert read_event_id(protocol, event) == event_id
