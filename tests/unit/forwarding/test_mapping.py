"""An event is mapped the same whether its bytes are read quickly or by protobuf."""

from random import Random
from typing import Any

import pytest
from hypothesis import given

from productgraph.v1.event_pb2 import Event
from server.forwarding.providers.amplitude import Amplitude
from server.forwarding.providers.mapping import VERSIONS
from server.forwarding.providers.mixpanel import Mixpanel
from tests.bench.events import KINDS
from tests.support.events import to_message
from tests.unit.forwarding.test_providers import parse, storable_events

PROVIDERS = Amplitude("", ""), Mixpanel("", "")
# An object that is sent in parts is read by protobuf, which merges them; these add nothing to it.
NOTHING_IN_PARTS = 2 * b"".join(
    Event(**{name: {}}).SerializeToString()  # type: ignore[arg-type]
    for name in ("attributes", "metadata")
)


def map_all(encoded: bytes) -> list[bytes]:
    """Return the payloads of an event by every version, for every provider."""
    return [p.encode_event(encoded, version) for p in PROVIDERS for version in VERSIONS]


@given(event=storable_events())
def test_both_ways_of_reading_make_the_same_payloads(event: Event) -> None:
    """Payloads of any storable event are those of the event with its objects sent in parts."""
    encoded = event.SerializeToString()
    assert map_all(encoded) == map_all(encoded + NOTHING_IN_PARTS)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_empty_texts_are_mapped_either_way(kind: str) -> None:
    """What is present and empty is mapped, whatever zero bytes there are in objects and texts."""
    draw = Random(kind)
    parts: list[dict[str, Any]] = [
        {"user.id": ""},
        {"event.sequence": 0},
        {"page.title": "a\0b"},
        {"api.status_code": 0},
        {"metadata": {"zero": 0, "": "", "none": None}},
        {"metadata": {"list": [0.5, [{}]]}},
    ]
    for sent in KINDS[kind](40):
        added = [to_message(part) for part in parts if draw.random() < 0.4]
        encoded = b"".join(message.SerializeToString() for message in (parse(sent), *added))
        assert map_all(encoded) == map_all(encoded + NOTHING_IN_PARTS)


@pytest.mark.parametrize("digits", [b"\0", b"\x80\0", b"\x80\x80\x80\x80\x10", b"\x80" * 9 + b"\2"])
def test_a_zero_of_many_digits_is_mapped(digits: bytes) -> None:
    """A number that is present and 0 is mapped, in whatever way its 0 is encoded."""
    number = Event.DESCRIPTOR.fields_by_name["api_status_code"].number
    tag = bytes((number << 3 & 0x7F | 0x80, number >> 4))
    for payload in map_all(Event(event_type="custom").SerializeToString() + tag + digits):
        assert b'"api_status_code":0' in payload
