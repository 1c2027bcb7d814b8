"""What a provider refuses is found, event by event, and never taken for something else."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest

from server.forwarding import lane
from server.forwarding.providers import amplitude
from tests.support.database import PROVIDERS
from tests.support.events import make_message
from tests.support.forwarding import Bench, make_events
from tests.support.provider_servers import Event, ProviderServer, Reply, Script
from tests.support.services import wait_until

pytestmark = pytest.mark.usefixtures("quick")

FIREWALL = "<html>Your request looked like an attack</html>"
ATTACK = "https://shop.example/?file=../../etc/passwd"
STOPPED = "SELECT stopped_reason FROM forward_lanes WHERE provider = %s AND stopped_reason <> ''"

each = pytest.mark.parametrize("name", PROVIDERS)


def guard(status: int) -> Callable[[Sequence[Event]], Script | None]:
    """Return the behaviour of a firewall: it answers so if an event holds an attack."""

    def behave(events: Sequence[Event]) -> Script | None:
        found = any(ATTACK in json.dumps(event) for event in events)
        return Script(Reply(status, FIREWALL.encode())) if found else None

    return behave


def count_singles(server: ProviderServer) -> int:
    """How many requests brought one event."""
    sizes = Counter(delivery.arrived_at for delivery in tuple(server.deliveries))
    return sum(size == 1 for size in sizes.values())


@each
@pytest.mark.parametrize("status", [403, 404, 405, 410])
def test_one_event_that_a_firewall_refuses_dies_alone(name: str, status: int, bench: Bench) -> None:
    """Of 201 events, the one that is answered 403 is dead with the answer, and 200 arrive."""
    server = bench.servers[name]
    server.behave = guard(status)
    attack = make_message("p", "attack", page_url=ATTACK)
    bench.store([*make_events("p", 200), attack])
    with bench.forwarding(name):
        wait_until(lambda: bench.read_pending(name) == set())
        bench.check()
    assert len(server.insert_ids) == 200
    assert [*bench.read_dead(name).values()] == [f"refused ({status})"]
    assert bench.query("SELECT answer FROM dead_events") == [(FIREWALL,)]
    assert bench.query(STOPPED, name) == []


@each
def test_many_refused_events_do_not_stop_a_lane(name: str, bench: Bench) -> None:
    """Half of all events are refused, each is dead, and the others arrive."""
    server = bench.servers[name]
    server.behave = guard(403)
    healthy = make_events("p", 20)
    attacks = [make_message("p", f"attack{n}", page_url=ATTACK) for n in range(20)]
    bench.store([*healthy, *attacks])
    with bench.forwarding(name):
        wait_until(lambda: bench.read_pending(name) == set())
    assert len(server.insert_ids) == 20
    assert len(bench.read_dead(name)) == 20


@each
def test_a_provider_that_refuses_everything_kills_nothing(name: str, bench: Bench) -> None:
    """403 to everything stops the lane after five single events; each probe tries another."""
    server = bench.servers[name]
    sizes: list[int] = []  # of the requests before the lane was stopped

    def refuse(events: Sequence[Event]) -> Script:
        if not bench.query(STOPPED, name):
            sizes.append(len(events))
        return Script(Reply(403, b"no"))

    server.behave = refuse
    for number in range(4):
        bench.store(make_events(f"p{number}", 50))
    with bench.forwarding(name):
        wait_until(lambda: bench.query(STOPPED, name))
        assert sizes.count(1) <= 5
        sent = len(server.statuses)
        wait_until(lambda: len(server.statuses) >= sent + 10)
        bench.check()
        probes = [delivery.insert_id for delivery in tuple(server.deliveries)[-10:]]
        assert len(set(probes)) == 10
        assert bench.read_dead(name) == {}
        assert server.insert_ids == set()
        server.behave = lambda _: None
        wait_until(lambda: bench.read_pending(name) == set())
        wait_until(lambda: bench.query(STOPPED, name) == [])
    assert len(server.insert_ids) == 200


@each
@pytest.mark.parametrize("status", [401, 403])
def test_age_limits_apply_in_a_stopped_lane(name: str, status: int, bench: Bench) -> None:
    """What has waited for too long is given up though its lane is stopped; the rest waits."""
    server = bench.servers[name]
    server.behave = lambda _: Script(Reply(status, b"no"))
    bench.store(make_events("old", 300))
    bench.query("UPDATE outbox_payloads SET received_at = now() - '4 days'::interval")
    bench.store(make_events("new", 10))
    with bench.forwarding(name):
        wait_until(lambda: len(bench.read_dead(name)) == 300)
        time.sleep(1)
        bench.check()
    assert all("given up after 3 days" in reason for reason in bench.read_dead(name).values())
    assert len(bench.read_pending(name)) == 10


def test_a_stopped_lane_buries_nothing_as_refused(bench: Bench) -> None:
    """A probe that is refused by name is no dead event: the lane goes on, and then it is."""
    server = bench.servers["amplitude"]
    server.behave = lambda _: Script(Reply(401, b""))
    bench.store(make_events("p", 1))
    with bench.forwarding("amplitude"):
        wait_until(lambda: bench.query(STOPPED, "amplitude"))
        report = {"code": 400, "events_with_invalid_fields": {"event_type": [0]}}
        server.behave = lambda _: Script(Reply(400, json.dumps(report).encode()))
        wait_until(lambda: len(bench.read_dead("amplitude")) == 1)
    tries = [delivery.status for delivery in server.deliveries]
    assert tries[-2:] == [400, 400]


def test_users_over_quota_wait_and_others_arrive(bench: Bench) -> None:
    """A 429 about the quota of a user delays that user's events by an hour, and nobody else's."""
    server = bench.servers["amplitude"]

    def behave(events: Sequence[Event]) -> Script | None:
        if not any(event.get("user_id") == "busy" for event in events):
            return None
        report = {"code": 429, "exceeded_daily_quota_users": {"busy": 7}}
        return Script(Reply(429, json.dumps(report).encode()))

    server.behave = behave
    events = make_events("p", 100)
    for event in events[::10]:
        event.user_id = "busy"
    bench.store(events)
    begun = time.monotonic()
    with bench.forwarding("amplitude"):
        wait_until(lambda: len(server.insert_ids) == 90)
        wait_until(lambda: len(bench.read_pending("amplitude")) == 10)
    waits = bench.query(
        "SELECT extract(epoch FROM due_at - now())::float, event_count FROM outbox_deliveries"
        " WHERE provider = 'amplitude'"
    )
    [(seconds, count)] = waits
    assert count == 10
    assert 3600 - (time.monotonic() - begun) - 5 < seconds <= 3600
    bench.query("UPDATE outbox_payloads SET received_at = now() - '4 days'::interval")
    bench.query("UPDATE outbox_deliveries SET due_at = now()")
    with bench.forwarding("amplitude"):
        wait_until(lambda: len(bench.read_dead("amplitude")) == 10)
    assert set(bench.read_dead("amplitude").values()) == {
        f"given up after 3 days, 0:00:00: {amplitude.QUOTA_REASON}"
    }


def test_an_event_that_is_silently_dropped_is_isolated(bench: Bench) -> None:
    """Of events of which one is not ingested, all others are done, and that one is tried again."""
    server = bench.servers["amplitude"]

    def behave(events: Sequence[Event]) -> Script | None:
        kept = [i for i, event in enumerate(events) if event["event_type"] != "lost"]
        if len(kept) == len(events):
            return None
        report = {"code": 200, "events_ingested": len(kept)}
        return Script(Reply(200, json.dumps(report).encode(), ingest=frozenset(kept)))

    server.behave = behave
    bench.store([*make_events("p", 99), make_message("p", "lost", event_name="lost")])
    with bench.forwarding("amplitude", max_age=timedelta(days=3)):
        wait_until(lambda: len(bench.read_pending("amplitude")) == 1)
        wait_until(lambda: count_singles(server) >= 4)
        bench.check()
        assert bench.read_dead("amplitude") == {}
        server.behave = lambda _: None
        wait_until(lambda: bench.read_pending("amplitude") == set())
    assert len(server.insert_ids) == 100


def test_a_provider_that_ingests_nothing_is_left_in_peace(bench: Bench) -> None:
    """If no single event is ingested either, the rest waits instead of being halved."""
    server = bench.servers["amplitude"]
    server.behave = lambda _: Script(Reply(200, b'{"code": 200, "events_ingested": 0}'))
    bench.store(make_events("p", 1000))
    with bench.forwarding("amplitude"):
        wait_until(lambda: bench.query("SELECT 1 FROM outbox_deliveries WHERE attempts > 0"))
        bench.check()
        assert bench.read_dead("amplitude") == {}
    [(rounds,)] = bench.query("SELECT max(attempts) FROM outbox_deliveries")
    assert len(server.statuses) <= rounds * (1 + 5)
    assert lane.CLAIM_BYTES == 16 << 20
