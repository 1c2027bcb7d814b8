"""What `serve` prints once the service answers."""

import json
import uuid
from datetime import UTC, datetime

from server.app.parts import DEMO_PROJECT, find_data, name_command
from server.config import Settings

_BANNER = """\
ProductGraph event ingestion
  HTTP  http://{host}:{http}
  gRPC  {host}:{grpc}
"""
_METRICS = "  metrics  http://{host}:{metrics}/metrics\n"
_CONSOLE = """
See events at http://{host}:{metrics}/
"""
_FIRST_KEY = """
A first API key, for project {project}. It is shown this once:
  {key}
"""
_MAKE_KEY = """
Make an API key, in a shell with the same settings:
  KEY=$({command} keys create --project {project})
"""
_EXAMPLES = """
Send an event over HTTP:
  curl -i -X POST http://{host}:{http}/v1/events \\
    -H 'Content-Type: application/json' -H "X-PG-API-Key: {key}" \\
    -d '{http_events}'

and one over gRPC:
  grpcurl {security} -emit-defaults -H "x-pg-api-key: {key}" \\
    -d '{grpc_events}' \\
    {host}:{grpc} {method}
"""
_METHOD = "productgraph.v1.EventIngestionService/IngestEvents"


def describe_service(settings: Settings, ports: dict[str, int], key: str | None) -> str:
    """Return where the service is, how to get an API key unless `key` is one, and examples."""
    places = {
        "host": _name_host(settings.host),
        "http": ports["PORT"],
        "grpc": ports["GRPC_PORT"],
    }
    banner = _BANNER.format(**places)
    if port := ports.get("METRICS_PORT"):
        banner += _METRICS.format(**places, metrics=port)
    banner += _describe_data(settings)
    banner += (_FIRST_KEY if key else _MAKE_KEY).format(
        key=key,
        project=DEMO_PROJECT,
        command=name_command(),
    )
    banner += _EXAMPLES.format(
        **places,
        key=key or "$KEY",
        method=_METHOD,
        security="-insecure" if settings.grpc_tls else "-plaintext",
        http_events=_make_example("over HTTP"),
        grpc_events=_make_example("over gRPC"),
    )
    if settings.console is not None:
        banner += _CONSOLE.format(**places, metrics=port)
    return banner


def _name_host(host: str) -> str:
    if host in ("0.0.0.0", "::", "127.0.0.1"):  # noqa: S104 - compared, not bound
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _describe_data(settings: Settings) -> str:
    if settings.database_url is not None:
        return ""
    data = find_data(settings)
    if not settings.data_dir_is_default or data == settings.data_dir.resolve():
        return f"  data  {data}\n"
    return f"  data  {data} (PostgreSQL's account cannot enter {settings.data_dir})\n"


def _make_example(title: str) -> str:
    event = {
        "event_id": f"evt_{uuid.uuid4()}",
        "project_id": DEMO_PROJECT,
        "session.id": "sess_first",
        "event.type": "page.view",
        "event.timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "page.path": "/hello",
        "page.title": f"Hello {title}",
    }
    return json.dumps({"events": [event]})
