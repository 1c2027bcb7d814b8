"""Parts of the service can be switched off or narrowed, and ingestion goes on as ever."""

from collections.abc import Callable, Iterator

import pytest

from tests.service.test_contract import ORIGIN, check_cors
from tests.service.test_parity import run_buf
from tests.service.test_rejected import read_kept, reject
from tests.support.clients import Tenant, accepted, open_tenant, send
from tests.support.services import Service, running_service


@pytest.fixture(scope="module")
def service(create_migrated: Callable[[], str]) -> Iterator[Service]:
    """Provide a service without all that can be switched off."""
    settings = {
        "CORS_ALLOWED_ORIGINS": f"{ORIGIN},https://b.example",
        "GRPC_REFLECTION": "false",
        "METRICS_PORT": "off",
        "REJECTED_KEEP": "off",
    }
    with running_service(settings | {"DATABASE_URL": create_migrated()}) as service:
        yield service


@pytest.fixture
def tenant(service: Service) -> Iterator[Tenant]:
    """Provide a tenant of that service."""
    with open_tenant(service) as tenant:
        yield tenant


def test_only_listed_origins_can_read_answers(service: Service) -> None:
    """Where origins are listed, other pages cannot read the answers."""
    check_cors(send(service, "GET", "/health", origin=ORIGIN))
    for origin in (None, "https://evil.example", f"{ORIGIN}.evil.example", "null"):
        answer = send(service, "GET", "/health", origin=origin)
        assert answer.headers["Access-Control-Allow-Origin"] is None
        assert "Origin" in answer.headers["Vary"]


def test_ingestion_works_with_reflection_switched_off(tenant: Tenant) -> None:
    """Reflection can be switched off, and ingestion works without it."""
    assert run_buf(tenant.service, '{"events": []}', tenant.project.key).returncode != 0
    assert tenant.call(b"") == accepted(0)


def test_requests_are_answered_without_a_metrics_page(tenant: Tenant) -> None:
    """With METRICS_PORT=off there is no page, and requests are answered as ever."""
    assert "metrics" not in tenant.service.output.read_text()
    assert "PRODUCTGRAPH_METRICS" not in tenant.service.find_workers()[0].environ()
    assert tenant.post_events([tenant.make_event()]) == accepted(1)


def test_no_rejected_event_is_kept_when_switched_off(tenant: Tenant) -> None:
    """With REJECTED_KEEP=off nothing is kept, and events are rejected as ever."""
    reject(tenant)
    # By its end, which makes this the last test here, the service has kept all that it will keep.
    assert tenant.service.stop() == 0
    assert read_kept(tenant) == []
