"""What the tests of forwarding have in common."""

from collections.abc import Callable, Iterator

import pytest

from server.forwarding import backoff, http_client, lane
from server.forwarding.providers import amplitude, mixpanel
from tests.support.forwarding import SECRET, Bench
from tests.support.provider_servers import AmplitudeServer, MixpanelServer, ProviderServer


@pytest.fixture(scope="module")
def url(create_migrated: Callable[[], str]) -> str:
    """Return a database of this module's own."""
    return create_migrated()


@pytest.fixture
def servers() -> Iterator[dict[str, ProviderServer]]:
    """Both providers' servers, by their names."""
    with AmplitudeServer(SECRET) as one, MixpanelServer(SECRET) as other:
        yield {"amplitude": one, "mixpanel": other}


@pytest.fixture
def bench(url: str, servers: dict[str, ProviderServer]) -> Bench:
    """Return a bench without events."""
    bench = Bench(url, servers)
    tables = "events, outbox_payloads, outbox_deliveries, dead_events, forward_lanes"
    bench.query(f"TRUNCATE {tables}")
    return bench


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All waits between tries are short."""
    monkeypatch.setattr(backoff, "SHORTEST_SECONDS", 0.1)
    monkeypatch.setattr(backoff, "LONGEST_SECONDS", 0.4)
    monkeypatch.setattr(lane, "_STOPPED_SECONDS", 0.3)
    monkeypatch.setattr(amplitude, "_THROTTLED_SECONDS", 0.5)
    monkeypatch.setattr(mixpanel, "_LEAST_WAIT_SECONDS", 0.2)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a request up soon; on a busy machine that sends some events twice."""
    monkeypatch.setattr(http_client, "TOTAL_SECONDS", 1.0)


@pytest.fixture(autouse=True)
def _no_surprises(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No lane meets an error that it does not know."""
    yield
    assert "forwarding failed" not in caplog.messages
