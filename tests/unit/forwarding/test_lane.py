"""Whatever the providers do, every stored event is delivered, dead with a reason, or pending."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from productgraph.v1.event_pb2 import Event
from server.forwarding.backoff import backoff_seconds
from server.forwarding.http_client import Transport
from server.forwarding.providers.amplitude import Amplitude
from server.forwarding.providers.mapping import make_insert_id
from server.forwarding.providers.mixpanel import Mixpanel
from server.forwarding.providers.provider import (
    Answer,
    NoAnswer,
    Request,
)
from server.forwarding.round import Item, RequestQueue
from server.storage.outbox import Delivery, Outcome
from tests.support import provider_servers
from tests.support.clients import open_tenant
from tests.support.database import PROVIDERS
from tests.support.events import make_message
from tests.support.forwarding import END_LEASES, SECRET, Bench, make_events
from tests.support.provider_servers import (
    HTML,
    AmplitudeServer,
    Fault,
    ProviderServer,
    Reply,
    Script,
)
from tests.support.services import (
    run_command,
    running_service,
    wait_until,
)

STATUS = re.compile(r"(\w+) +(\d+) +(?:-|\d+ s) +(\d+) +(\d+) +(?:-|\d+ s)  (.+)")

each = pytest.mark.parametrize("name", PROVIDERS)


@pytest.mark.parametrize(
    ("failures", "limit"),
    [(1, 2), (2, 4), (3, 8), (7, 128), (8, 256), (9, 300), (100, 300), (10**9, 300)],
)
def test_the_wait_between_tries_doubles_to_five_minutes(failures: int, limit: float) -> None:
    """The wait is drawn evenly from nothing up to 2 s, doubled each time, 5 min at the most."""
    assert [backoff_seconds(failures, lambda d=d: d) for d in (0.0, 0.25, 1.0)] == [  # type: ignore[misc]
        *(0, limit / 4, limit),
    ]
    drawn = [backoff_seconds(failures) for _ in range(500)]
    assert 0 <= min(drawn) < limit / 10
    assert limit * 0.9 < max(drawn) <= limit


class Mapper(Amplitude):
    """A provider whose payloads are what the events are called."""

    max_bytes = 10

    def encode_event(self, encoded: bytes, version: int) -> bytes:  # noqa: ARG002
        """Return the name."""
        return Event.FromString(encoded).event_name.encode()


@given(sizes=st.lists(st.integers(1, 12), max_size=40), count=st.integers(1, 5))
def test_requests_are_cut_in_order_within_limits(sizes: list[int], count: int) -> None:
    """Requests keep order and limits, a payload too large goes alone, and none could be joined."""
    events = {n: Event(event_name="x" * size).SerializeToString() for n, size in enumerate(sizes)}
    outcome = Outcome(Delivery(1, 1, 0, "p", datetime.now(UTC), datetime.now(UTC), 1, events))
    items = [Item(outcome, position, "s", (0, 0), 1.0) for position in events]
    queue = RequestQueue(items, Mapper("", ""), count)
    requests = list(iter(queue.take_request, []))
    assert [mapped.item for request in requests for mapped in request] == items
    weights = [[len(mapped.payload) for mapped in request] for request in requests]
    assert all(weight and len(weight) <= count for weight in weights)
    assert all(sum(weight) <= 10 or len(weight) == 1 for weight in weights)
    assert all(len(a) == count or sum(a) + b[0] > 10 for a, b in pairwise(weights))


def test_each_event_reaches_each_provider_once(bench: Bench) -> None:
    """Each event goes to each provider once, in full requests."""
    for project in "abc":
        bench.store(make_events(project, 1500))
    with bench.forwarding():
        bench.finish()
    for server in bench.servers.values():
        assert len(server.deliveries) == len(server.insert_ids) == 4500
        # Of 2,000 events and the rest.
        assert len(server.statuses) == 3
    lanes = bench.query("SELECT provider, delivered, stopped_reason FROM forward_lanes ORDER BY 1")
    assert lanes == [(name, 4500, None) for name in PROVIDERS]


def test_no_request_exceeds_a_providers_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request is larger than a provider takes."""
    # A busy machine is not to cut requests short for its own sake.
    monkeypatch.setattr("server.forwarding.round._MAPPING_SECONDS", 60.0)
    bench.store(make_events("p", 800, metadata={f"k{number}": "x" * 255 for number in range(100)}))
    with bench.forwarding():
        bench.finish()
    for server in bench.servers.values():
        assert set(server.statuses) == {200}
        assert len(server.statuses) == -(-23_000_000 // server.max_bytes)


def test_claimed_events_are_sent_in_time_order(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is claimed of a session is sent in the order of time, over commits and requests."""
    monkeypatch.setattr(Amplitude, "max_events", 100)
    monkeypatch.setattr(Mixpanel, "max_events", 100)
    events = [
        make_message("p", f"e{n}", seconds=1_700_000_000 + n, event_sequence=n) for n in range(400)
    ]
    for number, event in enumerate(events):
        event.session_id = f"s{number % 3}"
    random.Random(1).shuffle(events)
    for start in range(0, 400, 100):
        bench.store(events[start : start + 100])
    with bench.forwarding():
        bench.finish()
    for server in bench.servers.values():
        sessions = defaultdict(list)
        for delivery in list(server.deliveries):
            event = json.loads(delivery.payload)
            properties = event.get("event_properties") or event["properties"]
            sessions[properties["session_id"]].append(properties["sequence"])
        assert sessions == {f"s{first}": list(range(first, 400, 3)) for first in range(3)}


@pytest.mark.usefixtures("quick")
def test_every_try_sends_the_same_bytes(bench: Bench) -> None:
    """Every try sends the same bytes."""
    bodies: dict[str, list[bytes]] = defaultdict(list)

    class Recorder(Transport):
        async def send(self, request: Request) -> Answer | NoAnswer:
            bodies[request.url.partition("?")[0]].append(request.body)
            return await super().send(request)

    event = make_message("p", "e", metadata={f"k{n}": {"b": 1, "a": [n]} for n in range(30)})
    for server in bench.servers.values():
        server.scripts.extend([Script(Reply(500, b"")), Script(fault=Fault.RESET)])
    bench.store([event])
    with bench.forwarding(transport=Recorder):
        bench.finish()
    assert [len(sent) for sent in bodies.values()] == [3, 3]
    assert [len(set(sent)) for sent in bodies.values()] == [1, 1]


FAULTS = {
    **{fault.name: [Script(fault=fault)] * 2 for fault in Fault},
    "lost": [Script(Reply(200, b""), Fault.RESET)] * 3,
    "HTML": [Script(Reply(200, HTML, {"Content-Type": "text/html"}))] * 3,
    "500": [Script(Reply(500, b"oops"))] * 8,
    "502": [Script(Reply(502, HTML))] * 3,
    "503": [Script(Reply(503, b"{}"))] * 3,
    "429": [Script(Reply(429, b"{}"))] * 3,
    "redirect": [Script(Reply(307, b"", {"Location": "http://127.0.0.1:9/"}))] * 2,
    "endless": [Script(Reply(200, b" " * (5 << 20)))],
}


@pytest.mark.slow
@pytest.mark.usefixtures("quick", "impatient")
@pytest.mark.parametrize("scripts", FAULTS.values(), ids=FAULTS.keys())
def test_every_event_arrives_despite_failing_answers(scripts: list[Script], bench: Bench) -> None:
    """Whatever happens to the answers, everything arrives, unchanged at every try."""
    for server in bench.servers.values():
        server.scripts.extend(scripts)
    with bench.forwarding():
        for number in range(4):
            bench.store(make_events(f"p{number}", 50))
            bench.check()
        bench.finish()
    for name, server in bench.servers.items():
        assert bench.read_dead(name) == {}
        assert not server.scripts
        assert len(server.insert_ids) == 200


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@each
def test_an_outage_of_one_provider_delays_only_that(name: str, bench: Bench) -> None:
    """A provider that is down for a while gets everything afterwards; the other does not wait."""
    server, [other] = bench.servers[name], [s for n, s in bench.servers.items() if n != name]
    server.behave = lambda _: Script(Reply(500, b"down"))
    with bench.forwarding():
        for number in range(10):
            bench.store(make_events(f"p{number}", 30))
        wait_until(lambda: len(other.insert_ids) == 300 and len(server.statuses) > 3)
        bench.check()
        assert server.insert_ids == set()
        server.behave = lambda _: None
        bench.finish()


@pytest.mark.usefixtures("quick")
def test_a_request_refused_as_too_large_is_halved(bench: Bench) -> None:
    """A request refused as too large is halved until it fits."""
    for server in bench.servers.values():
        server.max_events = 60
    bench.store(make_events("p", 400))
    with bench.forwarding():
        bench.finish()
    for server in bench.servers.values():
        assert set(server.statuses) == {200, 413}
        assert len(server.insert_ids) == 400


@pytest.mark.usefixtures("quick")
def test_only_the_throttled_devices_wait(bench: Bench) -> None:
    """Throttled devices wait, and nobody else does."""
    server, released = bench.servers["amplitude"], threading.Event()

    def throttle(events: Sequence[provider_servers.Event]) -> Script | None:
        named = any(event["device_id"] == "busy" for event in events)
        if not named or released.is_set():
            return None
        return Script(Reply(429, b'{"code":429,"throttled_devices":{"busy":9}}'))

    server.behave = throttle
    events = make_events("p", 100)
    for event in events[::10]:
        event.session_id = "busy"
    bench.store(events)
    with bench.forwarding("amplitude"):
        wait_until(lambda: len(server.insert_ids) == 90 and server.statuses.count(429) > 1)
        released.set()
        wait_until(lambda: len(server.insert_ids) == 100)
        wait_until(lambda: bench.read_pending("amplitude") == set())
    held = [d.arrived_at for d in server.deliveries if json.loads(d.payload)["device_id"] == "busy"]
    waits = [b - a for a, b in pairwise(sorted(set(held)))]
    assert min(waits) >= 0.5
    assert bench.read_dead("amplitude") == {}


@pytest.mark.usefixtures("quick")
def test_one_bad_event_is_dead_and_199_arrive(bench: Bench) -> None:
    """Of two hundred events with a bad one, 199 arrive, and one is dead with its reason."""

    def refuse(events: Sequence[provider_servers.Event]) -> Script | None:
        bad = [i for i, event in enumerate(events) if event["event_type"] == "bad"]
        report = {"code": 400, "events_with_invalid_fields": {"event_type": bad}}
        return Script(Reply(400, json.dumps(report).encode())) if bad else None

    bench.servers["amplitude"].behave = refuse
    events = [*make_events("p", 199), make_message("p", "bad", seconds=5, event_name="bad")]
    bench.store(events)
    with bench.forwarding():
        bench.finish()
    bad = make_insert_id(events[-1])
    assert bench.read_dead("amplitude") == {bad: "invalid field event_type"}
    assert bench.read_dead("mixpanel") == {bad: "'properties.time' is invalid"}
    answers = bench.query("SELECT answer FROM dead_events")
    assert [json.loads(answer)["code"] for (answer,) in answers] == [400, 400]
    # Mixpanel has the others already, and must not get them twice.
    assert len(bench.servers["mixpanel"].deliveries) == 200


@pytest.mark.usefixtures("quick")
@each
def test_a_provider_rests_as_long_as_it_asks(name: str, bench: Bench) -> None:
    """A provider is left alone for as long as it asks."""
    server = bench.servers[name]
    server.scripts.append(Script(Reply(503, b"", {"Retry-After": "2"})))
    bench.store(make_events("p", 3))
    with bench.forwarding(name):
        wait_until(lambda: len(server.insert_ids) == 3)
    first, second = sorted({delivery.arrived_at for delivery in server.deliveries})
    assert second - first >= 2.0


@pytest.mark.usefixtures("quick")
@each
def test_an_event_in_vain_for_three_days_dies(name: str, bench: Bench) -> None:
    """What was in vain for three days is dead, with the last answer; the rest is tried on."""
    bench.store(make_events("old", 3))
    bench.query("UPDATE outbox_payloads SET received_at = now() - '3 days 1 s'::interval")
    bench.store(make_events("new", 4))
    bench.servers[name].behave = lambda _: Script(Reply(500, b"down"))
    with bench.forwarding():
        wait_until(lambda: len(bench.read_dead(name)) == 3)
        wait_until(lambda: len(bench.servers[name].deliveries) >= 7 + 4)
        bench.check()
        bench.servers[name].behave = lambda _: None
        bench.finish()
    assert set(bench.read_dead(name).values()) == {"given up after 3 days, 0:00:00"}
    assert bench.query("SELECT DISTINCT provider, answer FROM dead_events") == [(name, "down")]


@pytest.mark.usefixtures("quick")
@each
def test_wrong_credentials_stop_only_their_own_lane(name: str, bench: Bench) -> None:
    """Wrong credentials stop their lane alone, lose nothing, and it resumes once they are right."""
    server, [other] = bench.servers[name], [s for n, s in bench.servers.items() if n != name]
    state = "SELECT stopped_reason FROM forward_lanes WHERE provider = %s AND stopped_reason <> ''"
    with bench.forwarding():
        bench.store(make_events("before", 10))
        bench.finish()
        server.credential = "another"
        for number in range(5):
            bench.store(make_events(f"p{number}", 20))
        wait_until(lambda: bench.query(state, name) and len(other.insert_ids) == 110)
        sent = len(server.statuses)
        wait_until(lambda: len(server.statuses) >= sent + 2)
        tries = Counter(delivery.arrived_at for delivery in tuple(server.deliveries))
        assert tries[max(tries)] == 1  # a single event, to find out
        bench.check()
        assert len(server.insert_ids) == 10
        assert bench.read_dead(name) == {}
        assert SECRET not in str(bench.query(state, name))
        server.credential = SECRET
        bench.finish()
        wait_until(lambda: bench.query(state, name) == [])
    assert len(server.insert_ids) == 110


def test_payloads_of_a_newer_release_are_left_alone(bench: Bench) -> None:
    """What a newer release has kept is left to it, and does not hold up the rest."""
    for number in range(30):
        bench.store(make_events(f"newer{number}", 2))
    bench.query("UPDATE outbox_payloads SET mapping_version = 999")
    bench.store(make_events("own", 5))
    with bench.forwarding("amplitude"):
        wait_until(lambda: len(bench.servers["amplitude"].insert_ids) == 5)
    bench.check()
    kept = bench.query(
        "SELECT count(*), sum(d.event_count) FROM outbox_deliveries d JOIN outbox_payloads p"
        " ON p.id = d.payload_id WHERE mapping_version = 999 AND d.provider = 'amplitude'"
    )
    assert kept == [(30, 60)]
    assert bench.read_dead("amplitude") == {}
    assert len(bench.servers["amplitude"].deliveries) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("quick", "impatient")
@each
def test_a_hung_provider_does_not_slow_the_other(name: str, bench: Bench) -> None:
    """A provider that hangs does not slow the other."""
    hung, [other] = bench.servers[name], [s for n, s in bench.servers.items() if n != name]

    def measure_lag(project: str) -> float:
        stored_at: dict[str, float] = {}
        for number in range(20):
            events = make_events(f"{project} {number}", 10)
            bench.store(events)
            stored_at |= {make_insert_id(e): time.monotonic() for e in events}
        wait_until(lambda: stored_at.keys() <= other.insert_ids)
        arrived = {d.insert_id: d.arrived_at for d in other.deliveries}
        return sum(arrived[i] - at for i, at in stored_at.items()) / len(stored_at)

    with bench.forwarding():
        usual = measure_lag("usual")
        hung.behave = lambda _: Script(Reply(500, b""), Fault.HANG)
        # Whatever else the machine does may slow a part of the tries, and the hung provider all.
        assert any(measure_lag(f"hung {number}") < 3 * usual + 0.5 for number in range(5))
        bench.check()
        hung.behave = lambda _: None
        bench.finish()


def test_forwarding_uses_no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and credentials go to no proxy that the environment names."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)

        async def post() -> None:
            sender = Transport(1)
            with AmplitudeServer(SECRET) as server:
                sending = asyncio.ensure_future(sender.send(Request(server.url, {}, b"{}")))
                await asyncio.wait([sending], timeout=60)
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                await sender.close()
            assert len(server.statuses) == 1

        asyncio.run(post())


MOMENTS = ("after the 200", "after the claim", "during a batch", "at random")


@pytest.mark.slow
def test_killed_forwarders_lose_no_event(bench: Bench) -> None:
    """Forwarders killed at the worst moments lose nothing, and send again with the same ids."""
    draw = random.Random(3)
    for number in range(10):
        moment = MOMENTS[number % len(MOMENTS)]
        for part in range(3):
            bench.store(make_events(f"p{number} {part}", 100))
        server = bench.servers[PROVIDERS[number // len(MOMENTS) % 2]]
        with bench.process() as process:
            kill_at(moment, process, bench, server, draw.uniform(0.8, 1.3))
        for each_server in bench.servers.values():
            each_server.behave = lambda _: None
            each_server.max_events = ProviderServer.max_events
        late = "SELECT count(*) FROM outbox_deliveries WHERE due_at > now() + '60 s'::interval"
        assert bench.query(late) == [(0,)]
        bench.check()
        bench.query(END_LEASES)
    with bench.process() as process:
        bench.finish()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    for each_server in bench.servers.values():
        assert len(each_server.insert_ids) == 3000
    sent = sum(len(each_server.deliveries) for each_server in bench.servers.values())
    assert sent > 6000  # so that some were sent twice
    assert bench.query("SELECT count(*) FROM dead_events") == [(0,)]


def kill_at(
    moment: str,
    process: "subprocess.Popen[bytes]",
    bench: Bench,
    server: ProviderServer,
    seconds: float,
) -> None:
    """Kills a forwarder at this moment; `server` is the provider it is dealing with."""
    seen = len(server.statuses)
    leased = "SELECT 1 FROM outbox_deliveries WHERE lease IS NOT NULL AND due_at > now()"

    def kill(_: object) -> Script | None:
        # Within the batch, the second request; else the first one, which is ingested.
        if moment == "after the 200" or len(server.statuses) > seen:
            os.kill(process.pid, signal.SIGKILL)
        return None

    if moment in ("after the 200", "during a batch"):
        if moment == "during a batch":
            server.max_events = 50  # so that there are several requests
        server.behave = kill
    elif moment == "after the claim":
        for each_server in bench.servers.values():
            each_server.behave = lambda _: Script(Reply(500, b""), Fault.HANG)
        wait_until(lambda: bench.query(leased))
        process.kill()
    else:
        time.sleep(seconds)
        process.kill()
    assert process.wait(60) == -signal.SIGKILL


@pytest.mark.slow
def test_sigterm_ends_a_forwarder_with_a_hung_provider(bench: Bench) -> None:
    """SIGTERM ends a forwarder in time, however much is still to be sent to one that hangs."""
    server = bench.servers["amplitude"]
    bench.store(make_events("first", 1))
    with bench.process() as process:
        bench.finish()
        server.behave = lambda _: Script(Reply(500, b""), Fault.HANG)
        bench.store(make_events("large", 8000))  # four requests, one after the other
        wait_until(lambda: len(server.statuses) > 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(25) == 0  # `serve` kills it after 27 seconds
    bench.check()


@pytest.mark.usefixtures("quick")
def test_two_forwarders_send_nothing_twice(bench: Bench) -> None:
    """Forwarders share the work, and nothing is sent twice where none of them dies."""
    for number in range(50):
        bench.store(make_events(f"p{number}", 20))
    with bench.forwarding(), bench.forwarding():
        bench.finish()
    assert all(len(server.deliveries) == 1000 for server in bench.servers.values())


@pytest.mark.usefixtures("quick")
def test_forward_commands_manage_lanes_and_dead_events(bench: Bench) -> None:
    """The commands show how far each provider is, and list, retry and purge dead events."""
    bad = [make_message("p", f"bad{number}", seconds=5) for number in range(3)]
    bench.store([*make_events("p", 10), *bad])
    assert read_status(bench) == dict.fromkeys(PROVIDERS, ("13", "0", "0", "no forwarder"))
    with bench.forwarding("mixpanel"):
        wait_until(lambda: bench.read_pending("mixpanel") == set())
    bench.servers["amplitude"].credential = "another"
    state = "SELECT 1 FROM forward_lanes WHERE stopped_reason <> ''"
    with bench.forwarding("amplitude"):
        wait_until(lambda: bench.query(state))
    assert read_status(bench) == {
        "amplitude": ("13", "0", "0", "stopped: the API key was refused (400)"),
        "mixpanel": ("0", "10", "3", "forwarding"),
    }
    listed = run(bench, "forward", "dead", "list").splitlines()
    assert len(listed) == 3
    assert all("'properties.time' is invalid" in line and "mixpanel" in line for line in listed)
    assert "'bad2'" in listed[0]
    assert run(bench, "forward", "dead", "list", "--limit", "1").splitlines() == listed[:1]
    assert run(bench, "forward", "dead", "list", "--provider", "amplitude") == ""
    for action in ("retry", "purge"):
        refused = run_command("forward", "dead", action, settings=bench.settings)
        assert (refused.returncode, refused.stdout) == (2, "")
    newest = listed[0].split()[0]
    assert run(bench, "forward", "dead", "retry", newest) == "1 put back into the queue\n"
    assert read_status(bench)["mixpanel"] == ("1", "10", "2", "forwarding")
    bench.check()
    with bench.forwarding("mixpanel"):
        wait_until(lambda: len(bench.read_dead("mixpanel")) == 3)
    assert (
        run(bench, "forward", "dead", "purge", "--all", "--provider", "amplitude") == "0 deleted\n"
    )
    assert run(bench, "forward", "dead", "purge", listed[1].split()[0]) == "1 deleted\n"
    assert run(bench, "forward", "dead", "purge", "--all") == "2 deleted\n"
    assert run(bench, "forward", "dead", "list") == ""


def test_forward_purge_deletes_one_providers_queue_if_told(bench: Bench) -> None:
    """The command counts what waits for one provider, and with --yes deletes that and no more."""
    bench.store(make_events("p", 10))
    purge = ("forward", "purge", "--provider", "amplitude")
    assert run(bench, *purge) == "10 events wait for amplitude; --yes deletes them\n"
    assert len(bench.read_pending("amplitude")) == 10
    assert run(bench, *purge, "--yes") == "10 deleted\n"
    assert bench.read_pending("amplitude") == set()
    assert len(bench.read_pending("mixpanel")) == 10
    assert bench.query("SELECT count(*) FROM events") == [(10,)]
    assert run(bench, *purge, "--yes") == "0 deleted\n"
    refused = run_command("forward", "purge", "--yes", settings=bench.settings)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--provider" in refused.stderr


def run(bench: Bench, *arguments: str) -> str:
    """Return what a command prints; fail if it fails."""
    done = run_command(*arguments, settings=bench.settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_status(bench: Bench) -> dict[str, tuple[str, ...]]:
    """Pending, delivered, dead and state of each provider, as the command shows them."""
    head, *lines = run(bench, "forward", "status").splitlines()
    assert head.split() == ["PROVIDER", "PENDING", "OLDEST", "DELIVERED", "DEAD", "SEEN", "STATE"]
    found = [STATUS.fullmatch(line) for line in lines]
    return {lane[1]: lane.groups()[1:] for lane in found if lane}


@pytest.mark.parametrize("command", ["serve", "forward"])
@pytest.mark.parametrize("variable", ["AMPLITUDE_API_KEY", "MIXPANEL_TOKEN"])
def test_a_provider_without_credential_fails_the_start(
    command: str, variable: str, bench: Bench
) -> None:
    """A provider enabled without its credential is a start-up error that names the variable."""
    settings = bench.settings | {variable: "", "PORT": "0", "GRPC_PORT": "0"}
    done = run_command(command, settings=settings)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert f"{variable}: must be set" in line


@pytest.mark.slow
def test_two_workers_forward_every_accepted_event(
    create_migrated: Callable[[], str], servers: dict[str, ProviderServer]
) -> None:
    """Over two workers, 2,000 events in are 2,000 at each provider, and nothing rejected is."""
    bench = Bench(create_migrated(), servers)
    with (
        running_service(bench.settings | {"WORKERS": "2"}) as service,
        open_tenant(service) as tenant,
    ):

        def post(number: int) -> None:
            fields = {"event.timestamp": datetime.now(UTC).isoformat()}
            events = [
                tenant.make_event({"event_id": f"e{number} {event}"} | fields)
                for event in range(50)
            ]
            rejected = [tenant.make_event({"event_id": f"r{number}", "event.type": "no"})]
            for _ in range(2):  # the second time, nothing is new
                assert tenant.post_events([*events, *rejected, events[0]])["accepted"] == 51

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(post, range(40)))
        bench.finish()
        children = psutil.Process(service.process.pid).children(recursive=True)
        [process] = [child for child in children if child.cmdline()[-1:] == ["forward"]]
        assert service.stop() == 0
        assert not process.is_running()
    for server in servers.values():
        assert len(server.insert_ids) == len(server.deliveries) == 2000
        assert set(server.statuses) == {200}


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 2])
def test_serve_runs_as_many_forwarders_as_set(
    count: int, create_migrated: Callable[[], str], servers: dict[str, ProviderServer]
) -> None:
    """`serve` runs FORWARDERS of them; with none, events wait for one that runs elsewhere."""
    bench = Bench(create_migrated(), servers)
    with (
        running_service(bench.settings | {"FORWARDERS": str(count)}) as service,
        open_tenant(service) as tenant,
    ):
        assert len(service.find_forwarders()) == count
        tenant.post_events([tenant.make_event({"event.timestamp": datetime.now(UTC).isoformat()})])
        with bench.process() if count == 0 else nullcontext():
            bench.finish()
        assert service.stop() == 0


@pytest.mark.slow
def test_ingestion_has_priority_over_forwarding(bench: Bench) -> None:
    """Ingestion goes first, also where sessions share the processor as groups."""
    with running_service(bench.settings) as service:
        (process,) = service.find_forwarders()
        assert process.nice() == 10
        assert {worker.nice() for worker in service.find_workers()} == {0}
        group = Path(f"/proc/{process.pid}/autogroup")
        assert not group.exists() or group.read_text().endswith(" nice 10\n")


def test_a_forwarder_without_providers_waits(bench: Bench) -> None:
    """A forwarder without a provider says so and waits, for who restarts what has ended."""
    settings = bench.settings | {"ANALYTICS_ENABLED": "false"}
    with bench.process(settings, subprocess.PIPE) as process:
        assert process.stderr
        assert b"no analytics provider is enabled" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
