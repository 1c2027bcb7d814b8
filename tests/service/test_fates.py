"""`productgraph events show` tells the fate of an event: stored or not, and at each provider."""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from server.forwarding.providers.mapping import make_insert_id
from tests.support.clients import Tenant, accepted, open_tenant
from tests.support.events import to_message
from tests.support.forwarding import enable_providers
from tests.support.provider_servers import AmplitudeServer, MixpanelServer
from tests.support.services import running_service, wait_until

SECRET = "secret"
# So many of the number 1 make nearly the largest event; of a list, Mixpanel takes this many items.
GROWING_VALUES, MIXPANEL_ITEMS = 50_000, 254
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def amplitude() -> Iterator[AmplitudeServer]:
    """Serve the stand-in for Amplitude."""
    with AmplitudeServer(SECRET) as server:
        yield server


@pytest.fixture(scope="module")
def mixpanel() -> Iterator[MixpanelServer]:
    """Serve the stand-in for Mixpanel."""
    with MixpanelServer(SECRET) as server:
        yield server


@pytest.fixture(scope="module")
def tenant(
    create_migrated: Callable[[], str], amplitude: AmplitudeServer, mixpanel: MixpanelServer
) -> Iterator[Tenant]:
    """Yield a tenant of a service that forwards to both providers."""
    providers = enable_providers({"amplitude": amplitude, "mixpanel": mixpanel}, SECRET)
    settings = {"DATABASE_URL": create_migrated()} | providers
    with running_service(settings) as service, open_tenant(service) as tenant:
        wait_until(lambda: query(tenant, "SELECT 1 FROM forward_history") != [])
        month = f"SELECT to_regclass('events_{NOW:%Y_%m}')"
        wait_until(lambda: query(tenant, month) != [(None,)])  # which a starting service adds
        yield tenant


def query(tenant: Tenant, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement in the service's database, and return its rows."""
    with tenant.database.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def post(
    tenant: Tenant,
    event_id: str,
    age: timedelta = timedelta(),
    changes: Mapping[str, object] | None = None,
) -> None:
    """Send an event of that age."""
    moment = (NOW - age).isoformat()
    event = tenant.make_event({"event_id": event_id, "event.timestamp": moment})
    tenant.post_events([event | dict(changes or {})])


def show(tenant: Tenant, event_id: str) -> list[dict[str, Any]]:
    """Return what the command tells programs of an event."""
    done = tenant.service.run("events", "show", event_id, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def read_fates(tenant: Tenant, event_id: str) -> dict[str, dict[str, Any]]:
    """Return the fate of the one event of this id at each provider."""
    [found] = show(tenant, event_id)
    return {fate["provider"]: fate for fate in found["forwarding"]}


def has_state(tenant: Tenant, event_id: str, provider: str, state: str) -> bool:
    """Return whether an event has this state at a provider."""
    return bool(read_fates(tenant, event_id).get(provider, {}).get("state") == state)


def test_a_delivered_event_is_shown_as_delivered(tenant: Tenant) -> None:
    """Once both providers have it, the event is shown as stored, where and when, and delivered."""
    post(tenant, "sent", changes={"page.path": "/p"})
    for provider in ("amplitude", "mixpanel"):
        wait_until(lambda: has_state(tenant, "sent", provider, "delivered"))  # noqa: B023 - at once
    [found] = show(tenant, "sent")
    assert found["event"]["page.path"] == "/p"
    assert found["partition"] == f"events_{NOW:%Y_%m}"
    assert abs(datetime.fromisoformat(found["received_at"]) - NOW) < timedelta(hours=1)
    printed = tenant.service.run("events", "show", "sent").stdout
    assert f"in events_{NOW:%Y_%m}\namplitude  delivered\nmixpanel   delivered\n" in printed


def test_an_event_that_was_sent_twice_is_there_once(tenant: Tenant) -> None:
    """The same event again is still one event, and another time makes another."""
    for _ in range(2):
        post(tenant, "twice")
    assert len(show(tenant, "twice")) == 1
    post(tenant, "twice", timedelta(seconds=1))
    assert len(show(tenant, "twice")) == 2


@pytest.mark.slow
def test_a_waiting_event_tells_its_tries_and_the_next(
    tenant: Tenant, amplitude: AmplitudeServer
) -> None:
    """While a provider refuses our credentials, an event waits for it, and for it alone."""
    amplitude.credential = "another"
    try:
        post(tenant, "waiting")
        wait_until(lambda: has_state(tenant, "waiting", "mixpanel", "delivered"))
        fate = read_fates(tenant, "waiting")["amplitude"]
        assert fate["state"] == "waiting"
        assert datetime.fromisoformat(fate["next_try_at"])
        assert "amplitude  waiting: " in tenant.service.run("events", "show", "waiting").stdout
    finally:
        amplitude.credential = SECRET
    wait_until(lambda: has_state(tenant, "waiting", "amplitude", "delivered"), 90)


def test_a_dead_event_tells_why_and_keeps_its_time_when_retried(tenant: Tenant) -> None:
    """A refused event is dead with the reason; retried and refused again, it is still the same."""
    post(tenant, "dead", timedelta(hours=-3))  # Mixpanel takes nothing so far ahead
    wait_until(lambda: has_state(tenant, "dead", "mixpanel", "dead"))
    first = read_fates(tenant, "dead")["mixpanel"]
    assert "time" in first["reason"]
    assert tenant.service.run("forward", "dead", "retry", str(first["id"])).returncode == 0
    wait_until(
        lambda: (
            has_state(tenant, "dead", "mixpanel", "dead")
            and read_fates(tenant, "dead")["mixpanel"]["id"] != first["id"]
        )
    )
    [[same]] = query(
        tenant,
        "SELECT d.received_at = e.received_at FROM dead_events d JOIN events e USING (event_id)"
        " WHERE event_id = 'dead'",
    )
    assert same
    assert "mixpanel   dead: number " in tenant.service.run("events", "show", "dead").stdout


def test_after_a_purge_nothing_is_said_to_be_delivered(tenant: Tenant) -> None:
    """What may have been purged is not called delivered; what came later is."""
    post(tenant, "purged", timedelta(hours=-4))
    wait_until(lambda: has_state(tenant, "purged", "mixpanel", "dead"))
    number = str(read_fates(tenant, "purged")["mixpanel"]["id"])
    assert tenant.service.run("forward", "dead", "purge", number).returncode == 0
    fate = read_fates(tenant, "purged")["mixpanel"]
    assert (fate["state"], fate["why"]) == ("unknown", "purged")
    post(tenant, "later")
    wait_until(lambda: has_state(tenant, "later", "mixpanel", "delivered"))


@pytest.mark.parametrize("provider", ["amplitude", "mixpanel"])
def test_before_a_provider_was_enabled_nothing_is_delivered(tenant: Tenant, provider: str) -> None:
    """An event from before a provider was known to be enabled is not called delivered to it."""
    post(tenant, f"before_{provider}")
    wait_until(lambda: has_state(tenant, f"before_{provider}", provider, "delivered"))
    where = f"WHERE provider = '{provider}'"
    [[since]] = query(tenant, f"SELECT enabled_since FROM forward_history {where}")
    query(tenant, f"UPDATE forward_history SET enabled_since = now() {where}")
    try:
        assert read_fates(tenant, f"before_{provider}")[provider]["state"] == "unknown"
    finally:
        query(tenant, f"UPDATE forward_history SET enabled_since = '{since}' {where}")


def test_a_rejected_event_is_found_by_its_id(tenant: Tenant) -> None:
    """A rejected event is shown with its number and the reason, over both protocols."""
    post(tenant, "refused", changes={"event.type": "ui.hover"})
    wait_until(lambda: query(tenant, "SELECT 1 FROM rejected_events WHERE event_id = 'refused'"))
    [found] = show(tenant, "refused")
    assert found["rejected"]["reason"].startswith("event.type: unknown type 'ui.hover'")
    printed = tenant.service.run("events", "show", "refused").stdout
    assert f"rejected   number {found['rejected']['id']} in `rejected`" in printed


def test_an_unknown_event_says_what_was_looked_through(tenant: Tenant) -> None:
    """An id that is not there is a failure that tells since when events are kept."""
    post(tenant, "known", timedelta(days=1))
    done = tenant.service.run("events", "show", "nowhere", "--project", tenant.project.id)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no event 'nowhere'" in done.stderr
    assert f"there are events since {NOW - timedelta(days=1):%Y-%m-%d}" in done.stderr
    since = ["--since", "1h"]
    assert tenant.service.run("events", "show", "known", *since).returncode == 1


def test_a_replayed_event_is_shown_as_stored(tenant: Tenant) -> None:
    """An event that is sent in again correctly is shown both ways."""
    post(tenant, "mended", changes={"event.type": "ui.hover"})
    wait_until(lambda: query(tenant, "SELECT 1 FROM rejected_events WHERE event_id = 'mended'"))
    assert tenant.post_events(
        [tenant.make_event({"event_id": "mended", "event.timestamp": NOW.isoformat()})]
    ) == accepted(1)
    assert [set(found) & {"event", "rejected"} for found in show(tenant, "mended")] == [
        {"event"},
        {"rejected"},
    ]


def test_events_that_grow_as_protobuf_are_forwarded_whole(
    tenant: Tenant, amplitude: AmplitudeServer, mixpanel: MixpanelServer
) -> None:
    """Events of 100 KB of JSON, six times that as protobuf, pass the outbox and reach providers."""
    numbers = [1] * GROWING_VALUES
    changes = {"event.timestamp": NOW.isoformat(), "metadata": {"numbers": numbers}}
    events = [tenant.make_event(changes | {"event_id": f"growing-{n}"}) for n in range(4)]
    messages = [to_message(event) for event in events]
    assert all(len(orjson.dumps(event)) < 102_400 for event in events)
    assert all(message.ByteSize() > 500_000 for message in messages)
    assert tenant.post_events(events) == accepted(4)
    ids = {make_insert_id(message) for message in messages}
    wait_until(lambda: ids <= amplitude.insert_ids & mixpanel.insert_ids)
    for insert_id in ids:
        [payload] = map(orjson.loads, amplitude.payloads_of(insert_id))
        assert payload["event_properties"]["numbers"] == numbers
        [payload] = map(orjson.loads, mixpanel.payloads_of(insert_id))
        assert payload["properties"]["numbers"] == numbers[:MIXPANEL_ITEMS]
    wait_until(lambda: has_state(tenant, "growing-3", "mixpanel", "delivered"))
