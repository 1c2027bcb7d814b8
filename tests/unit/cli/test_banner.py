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
