"""A lane sends something for each claim, however slow the machine, and is fair to all projects."""

import threading
import time

import pytest

from productgraph.v1.event_pb2 import Event
from server.events.event_order_pb2 import EventOrder
from server.forwarding import lane
from server.forwarding import round as rounds
from server.forwarding.providers.amplitude import Amplitude
from server.storage.outbox import claim_batch
from tests.support.forwarding import Bench, make_events
from tests.support.services import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make mapping slow: 200 events take two seconds, and a round has a quarter of one."""
    encode = Amplitude.encode_event

    def encode_slowly(provider: Amplitude, encoded: bytes, version: int) -> bytes:
        time.sleep(0.01)
        return encode(provider, encoded, version)

    monkeypatch.setattr(Amplitude, "encode_event", encode_slowly)
    monkeypatch.setattr(lane, "_ROUND_SECONDS", 0.3)
    monkeypatch.setattr(rounds, "_MAPPING_SECONDS", 0.25)


@pytest.mark.usefixtures("slow")
def test_slow_mapping_still_delivers_everything(bench: Bench) -> None:
    """Each claim sends at least one request, though mapping takes longer than a round lasts."""
    bench.store(make_events("p", 200))
    with bench.forwarding("amplitude"):
        server = bench.servers["amplitude"]
        wait_until(lambda: len(server.insert_ids) > 0)
        wait_until(lambda: len(server.insert_ids) == 200)
        bench.check()
    assert len(server.deliveries) == 200  # nothing twice


def test_requests_are_mapped_beside_the_one_before(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request is sent before the last event is mapped."""
    server = bench.servers["amplitude"]
    seen: list[int] = []
    encode = Amplitude.encode_event

    def encode_watched(provider: Amplitude, encoded: bytes, version: int) -> bytes:
        seen.append(len(server.statuses))
        time.sleep(0.001)
        return encode(provider, encoded, version)

    monkeypatch.setattr(Amplitude, "encode_event", encode_watched)
    monkeypatch.setattr(Amplitude, "max_events", 100)
    bench.store(make_events("p", 400))
    with bench.forwarding("amplitude"):
        wait_until(lambda: len(server.insert_ids) == 400)
    assert seen[0] == 0
    assert seen[-1] > 0


def test_a_lane_maps_one_request_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests may be in flight, one is mapped at a time, and sent before the next."""
    server = bench.servers["amplitude"]
    mapping: set[int] = set()
    most, seen = 0, []
    encode = Amplitude.encode_event

    def encode_watched(provider: Amplitude, encoded: bytes, version: int) -> bytes:
        nonlocal most
        mapping.add(threading.get_ident())
        most = max(most, len(mapping))
        seen.append(len(server.statuses))
        time.sleep(0.001)
        mapping.remove(threading.get_ident())
        return encode(provider, encoded, version)

    monkeypatch.setattr(Amplitude, "encode_event", encode_watched)
    events = make_events("p", 1600)
    for number, event in enumerate(events):
        event.session_id = f"s{number}"
    bench.store(events)
    with bench.forwarding("amplitude"):
        wait_until(lambda: len(server.insert_ids) == 1600)
    assert most == 1
    assert seen[-1] > 0


def test_a_claim_shrinks_while_there_is_no_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After rounds without a request a claim takes less, and more again after others."""
    limits: list[int] = []

    def claim_watched(*arguments: object) -> object:
        limits.append(arguments[3].events)  # type: ignore[attr-defined]
        return claim_batch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lane, "claim_batch", claim_watched)
    monkeypatch.setattr(lane, "LEASE_SECONDS", 25.0)  # no request could end within it
    bench.store(make_events("p", 3))
    with bench.forwarding("amplitude"):
        wait_until(lambda: min(limits, default=8000) <= 1000)
        monkeypatch.setattr(lane, "LEASE_SECONDS", 60.0)
        wait_until(lambda: len(bench.servers["amplitude"].insert_ids) == 3)
        while limits[-1] < 8000:
            sent = len(bench.servers["amplitude"].insert_ids)
            bench.store(make_events(f"after{sent}", 1))
            wait_until(lambda s=sent: len(bench.servers["amplitude"].insert_ids) > s)  # type: ignore[misc]
    assert limits[:3] == [8000, 4000, 2000]
    assert min(limits) <= 1000


def test_a_backlog_of_one_project_delays_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others store is delivered long before the backlog of one project is."""
    monkeypatch.setattr(Amplitude, "max_events", 50)
    for number in range(60):
        bench.store(make_events("many", 100 + number)[-100:])
        bench.query(
            "UPDATE outbox_deliveries SET due_at = now() - '1 day'::interval"
            " WHERE due_at > now() - '1 h'::interval"
        )
    bench.store(make_events("few", 5))
    server = bench.servers["amplitude"]
    before = bench.read_pending("amplitude")
    with bench.forwarding("amplitude"):
        wait_until(lambda: bench.read_pending("amplitude") == set(), 60)
    order = [delivery.payload for delivery in server.deliveries]
    positions = [at for at, payload in enumerate(order) if b'"project_id":"few"' in payload]
    assert len(positions) == 5
    assert max(positions) < 500
    assert len(order) == len(before)


def test_the_order_message_has_the_events_numbers() -> None:
    """The part of an event that tells its order is read from the same fields."""
    for field in EventOrder.DESCRIPTOR.fields:
        same = Event.DESCRIPTOR.fields_by_name[field.name]
        assert (field.number, field.type) == (same.number, same.type)
