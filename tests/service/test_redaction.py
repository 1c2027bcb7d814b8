"""A service redacts on the way in, before anything keeps or shows an event."""

from collections.abc import Callable, Iterator

import pytest

from productgraph.v1.event_pb2 import Event as EventMessage
from server.protocols import GRPC, HTTP
from tests.support.clients import Tenant, open_tenant
from tests.support.events import to_message
from tests.support.forwarding import QUEUE_ALONE
from tests.support.services import Service, run_command, running_service, wait_until

SECRET = "0123456789abcdef0123456789abcdef"
TRACE = "z@example.org"
REDACT = "page.url=no-query,metadata.email=hash,error.stack=drop,ui.action=drop"


@pytest.fixture(scope="module")
def redacting(create_migrated: Callable[[], str]) -> Iterator[Service]:
    """Provide a service that redacts, and can deliver nothing."""
    settings = {"DATABASE_URL": create_migrated(), "PRIVACY_SECRET": SECRET, "REDACT": REDACT}
    with running_service(settings | QUEUE_ALONE) as service:
        yield service


@pytest.fixture
def tenant(redacting: Service) -> Iterator[Tenant]:
    """Provide a project of the service."""
    with open_tenant(redacting) as tenant:
        yield tenant


@pytest.mark.parametrize("protocol", [HTTP, GRPC])
def test_a_service_keeps_events_redacted_everywhere(tenant: Tenant, protocol: str) -> None:
    """Rows, what waits for providers and rejected events are redacted, over both protocols."""
    fields = {"page.url": f"https://x/?u={TRACE}", "error.stack": f"at {TRACE}"}
    more = {"metadata": {"email": TRACE, "kept": "yes"}, "duration_ms": 5}
    good = tenant.make_event(fields | more)
    bad = tenant.make_event(fields | more | {"event_id": "bad", "event.type": "ui.hover"})
    if protocol == HTTP:
        assert tenant.post_events([good, bad, f"no event {TRACE}"])["rejected"] == 2
    else:
        frames: list[EventMessage | bytes] = [
            to_message(good),
            to_message(bad),
            b"\xff" + TRACE.encode(),
        ]
        assert tenant.ingest(frames)["rejected"] == 2
    [row] = tenant.read_rows()
    assert (row["page_url"], row["error_stack"]) == ("https://x/", None)
    assert row["metadata"]["kept"] == "yes"
    assert len(row["metadata"]["email"]) == 32

    def read(table: str, column: str) -> list[bytes]:
        with tenant.database.cursor() as cursor:
            where = "WHERE project_id = %s"
            cursor.execute(f"SELECT {column} FROM {table} {where}", [tenant.project.id])
            return [bytes(content) for (content,) in cursor.fetchall()]

    wait_until(lambda: read("rejected_events", "event"))
    [rejected] = read("rejected_events", "event")
    [queued] = read("outbox_payloads", "events")
    assert b"bad" in rejected
    for kept in (rejected, queued):
        assert TRACE.encode() not in kept
        assert row["metadata"]["email"].encode() in kept


def test_rules_that_cannot_be_followed_end_the_start(redacting: Service) -> None:
    """An id or a hash without the secret ends the start with one line that names the setting."""
    for rules, secret, named in (("user.id=hash", SECRET, "REDACT: "), ("a=hash", "", "PRIVACY_")):
        settings = dict(redacting.settings) | {"REDACT": rules, "PRIVACY_SECRET": secret}
        done = run_command("serve", settings=settings)
        assert done.returncode == 1
        assert f"productgraph: {named}" in done.stderr
