"""What `serve` prints."""

import pytest

from server.cli.banner import describe_service
from server.config import read_settings

PORTS = {"PORT": 8080, "GRPC_PORT": 50051, "METRICS_PORT": 9464}


@pytest.mark.parametrize(
    ("host", "printed"),
    [
        ("127.0.0.1", "localhost"),
        ("0.0.0.0", "localhost"),
        ("::", "localhost"),
        ("::1", "[::1]"),
        ("fd00::7", "[fd00::7]"),
        ("ingest.example.com", "ingest.example.com"),
    ],
)
def test_addresses_are_printed_so_that_they_can_be_used(host: str, printed: str) -> None:
    """Every address has the host in the form that URLs need, IPv6 in brackets."""
    settings = read_settings({"HOST": host, "DATABASE_URL": "postgresql://localhost/events"})
    banner = describe_service(settings, PORTS, None)
    for address in (
        f"  HTTP  http://{printed}:8080\n",
        f"  gRPC  {printed}:50051\n",
        f"  metrics  http://{printed}:9464/metrics\n",
        f" http://{printed}:8080/v1/events ",
        f" {printed}:50051 productgraph.v1",
    ):
        assert address in banner


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "\nSee events at http://localhost:9464/\n"),
        ({"HOST": "::1"}, "\nSee events at http://[::1]:9464/\n"),
        ({"CONSOLE": "off"}, None),
        ({"DATABASE_URL": "postgresql://localhost/events"}, None),
        ({"HOST": "0.0.0.0"}, None),
    ],
)
def test_the_console_is_named_only_if_it_is_on(settings: dict[str, str], line: str | None) -> None:
    """The banner ends with the console's address, and says nothing of it if it is off."""
    banner = describe_service(read_settings(settings), PORTS, None)
    assert banner.endswith(line or "EventIngestionService/IngestEvents\n")
    assert ("See events" in banner) is (line is not None)
