"""A blocked person's events are answered like any others, and dropped."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import urlopen

import pytest

from productgraph.v1.event_pb2 import Event
from server.events.encoded_events_pb2 import EncodedEvents
from server.protocols import GRPC, HTTP
from tests.support.clients import Tenant, open_tenant
from tests.support.events import make_event, make_message, to_message
from tests.support.forwarding import QUEUE_ALONE
from tests.support.persons import PersonDatabase
from tests.support.services import Service, run_command, running_service, wait_until

KEY = "0123456789abcdef0123456789abcdef"
USER, UNBLOCKED = 'žofie\to\'neill "x"', "blocked for a while"
ANONYMOUS = f"anonymous {USER}"


@pytest.fixture(scope="module")
def blocking(create_migrated: Callable[[], str]) -> Iterator[Service]:
    """Provide a service with a secret, that can deliver nothing."""
    settings = {"DATABASE_URL": create_migrated(), "PRIVACY_SECRET": KEY}
    with running_service(settings | QUEUE_ALONE) as service:
        yield service


@pytest.fixture(scope="module")
def sender(blocking: Service) -> Iterator[Tenant]:
    """Provide a project in which two persons are blocked, once the service knows."""
    with open_tenant(blocking) as tenant:
        for user in (USER, UNBLOCKED):
            change(tenant, "block", user)

        dropped = 0

        def is_blocked() -> bool:
            nonlocal dropped
            events = [{"event_id": user, "user.id": user} for user in (USER, UNBLOCKED)]
            tenant.post_events(map(tenant.make_event, events))
            stored = len(tenant.take_rows())
            dropped += len(events) - stored
            return not stored

        wait_until(is_blocked)
        wait_until(lambda: count_blocked(blocking) == dropped)  # metrics come after answers
        yield tenant


@pytest.fixture
def tenant(sender: Tenant) -> Tenant:
    """Provide that project without events."""
    with sender.database.cursor() as cursor:
        for table in ("events", "outbox_deliveries", "outbox_payloads", "rejected_events"):
            cursor.execute(f"DELETE FROM {table} WHERE project_id = %s", [sender.project.id])
    return sender


def change(tenant: Tenant, command: str, user: str) -> str:
    """Block or unblock a person."""
    done = tenant.service.run(
        *("person", command, "--project", tenant.project.id),
        *("--user", user, "--anonymous-id", f"anonymous {user}"),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def count_blocked(service: Service) -> int:
    """Return the metric of dropped events."""
    with urlopen(service.metrics_url, timeout=10) as answer:
        page = answer.read().decode()
    found = re.search(r"^productgraph_events_blocked_total (\d+)", page, re.MULTILINE)
    assert found
    return int(found[1])


def read_queued(tenant: Tenant) -> list[str]:
    """Return the ids of the events that wait for the provider."""
    with tenant.database.cursor() as cursor:
        cursor.execute(
            "SELECT events FROM outbox_payloads WHERE project_id = %s", [tenant.project.id]
        )
        payloads = [EncodedEvents.FromString(bytes(events)) for (events,) in cursor.fetchall()]
    return [Event.FromString(event).event_id for each in payloads for event in each.events]


def make_mixed(tenant: Tenant, **more: object) -> list[dict[str, Any]]:
    """Return events of the person by each id, and of neighbours."""
    changes: list[dict[str, object]] = [
        {"user.id": USER},
        {"user.id": "neighbour", "metadata": {"user.anonymous_id": ANONYMOUS}},
        {"user.anonymous_id": ANONYMOUS, "page.title": "a\tb"},
        {"user.anonymous_id": "other"},
    ]
    return [
        tenant.make_event({"event_id": f"e{number}"} | each | more)
        for number, each in enumerate(changes)
    ]


def send(tenant: Tenant, protocol: str, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Send events over a protocol, and return what became of them."""
    if protocol == HTTP:
        return tenant.post_events(events)
    messages = []
    for event in events:
        anonymous = event.pop("user.anonymous_id", None)
        messages.append(to_message(event))
        if anonymous is not None:
            messages[-1].attributes["user.anonymous_id"] = anonymous
    return tenant.ingest(messages)


@pytest.mark.parametrize("protocol", [HTTP, GRPC])
def test_events_of_the_blocked_are_accepted_and_dropped(tenant: Tenant, protocol: str) -> None:
    """Over both protocols all are accepted, the neighbours' stored and forwarded, and no others."""
    before = count_blocked(tenant.service)
    events = make_mixed(tenant)
    sent = send(tenant, protocol, events)
    assert sent == {"accepted": 4, "rejected": 0, "errors": []}
    assert [row["event_id"] for row in tenant.read_rows()] == ["e1", "e3"]
    assert sorted(read_queued(tenant)) == ["e1", "e3"]
    wait_until(lambda: count_blocked(tenant.service) == before + 2)


@pytest.mark.parametrize("protocol", [HTTP, GRPC])
def test_rejected_events_of_the_blocked_are_not_kept(tenant: Tenant, protocol: str) -> None:
    """Invalid events of the person are rejected as always, and only the neighbours' are kept."""
    events = make_mixed(tenant, **{"event.type": "ui.hover"})
    sent = send(tenant, protocol, events)
    assert sent["rejected"] == 4

    def read_kept() -> list[str]:
        with tenant.database.cursor() as cursor:
            cursor.execute(
                "SELECT event_id FROM rejected_events WHERE project_id = %s ORDER BY 1",
                [tenant.project.id],
            )
            return [event_id for (event_id,) in cursor.fetchall()]

    wait_until(lambda: len(read_kept()) >= 2)
    assert read_kept() == ["e1", "e3"]


def test_replay_and_retry_drop_the_blocked(tenant: Tenant) -> None:
    """What was rejected or dead before is dropped when it is replayed or put back."""
    project, database = tenant.project.id, PersonDatabase(tenant.service.database_url)
    for name, user in (("r-own", USER), ("r-other", "neighbour")):
        event = make_event(project, name, {"user.id": user})
        database.reject(project, HTTP, json.dumps(event).encode())
        database.bury(make_message(project, f"d-{name}", user_id=user), provider=project)
    replay = ("rejected", "replay", "--all", "--project", project)
    assert tenant.service.run(*replay).stdout == "2 accepted, 0 rejected again\n"
    assert [row["event_id"] for row in tenant.read_rows()] == ["r-other"]
    retry = ("forward", "dead", "retry", "--all", "--provider", project)
    assert tenant.service.run(*retry).stdout == "1 put back into the queue\n"
    left = database.query("SELECT 1 FROM dead_events WHERE project_id = %s", project)
    assert left == []
    assert {"d-r-own", "d-r-other"} & set(read_queued(tenant)) == {"d-r-other"}


def test_commands_refuse_to_guess_under_another_secret(tenant: Tenant) -> None:
    """Under another secret the blocked cannot be recognised: nothing is replayed or put back."""
    for secret in ("", KEY[::-1]):
        settings = {"DATABASE_URL": tenant.service.database_url, "PRIVACY_SECRET": secret}
        for command in (("rejected", "replay", "--all"), ("forward", "dead", "retry", "--all")):
            done = run_command(*command, settings=settings)
            assert done.returncode == 1
            assert "blocked under another PRIVACY_SECRET" in done.stderr


def test_an_unblocked_person_is_stored_again(tenant: Tenant) -> None:
    """Once unblocked, the person's events are stored within seconds; the status tells of both."""
    person = ("--project", tenant.project.id, "--user", UNBLOCKED)
    status = ("person", "status", "--json", *person)
    assert len(json.loads(tenant.service.run(*status).stdout)["blocked"]) == 1
    unblocked = "2 of 2 ids were blocked, and are no longer\n"
    assert change(tenant, "unblock", UNBLOCKED) == unblocked
    assert json.loads(tenant.service.run(*status).stdout) == {"blocked": {}, "receipts": []}
    event = tenant.make_event({"user.id": UNBLOCKED})

    def is_stored() -> bool:
        tenant.post_events([event])
        return bool(tenant.read_rows())

    wait_until(is_stored)
