"""The command line `productgraph`."""

import argparse
import json
import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from server import app
from server.cli.command import SETTINGS, Run, add_command
from server.cli.forward import add_forward_commands
from server.cli.keys import add_key_commands
from server.cli.rejected import add_rejected_commands
from server.cli.retention import add_retention_command
from server.config import InvalidSetting, Settings, read_settings
from server.logs import configure_logs
from server.processes.supervisor import PortTaken, WorkerFailed
from server.storage.connection import DatabaseError, open_engine
from server.storage.embedded import EmbeddedPostgresError
from server.storage.migrate import check_migrated, migrate

_FAILURES = (InvalidSetting, DatabaseError, EmbeddedPostgresError, PortTaken, WorkerFailed)

_BANNER = """\
ProductGraph event ingestion
  HTTP  http://{host}:{http}
  gRPC  {host}:{grpc}
"""
_METRICS = "  metrics  http://{host}:{metrics}/metrics\n"
_FIRST_KEY = """
A first API key, for project {project}. It is shown this once:
  {key}

Send an event over HTTP:
  curl -i -X POST http://{host}:{http}/v1/events \\
    -H 'Content-Type: application/json' -H 'X-PG-API-Key: {key}' \\
    -d '{http_events}'

and one over gRPC:
  grpcurl {security} -H 'x-pg-api-key: {key}' \\
    -d '{grpc_events}' \\
    {host}:{grpc} {method}
"""
_METHOD = "productgraph.v1.EventIngestionService/IngestEvents"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, or 1 after one line on standard error."""
    options = _build_parser().parse_args(arguments)
    try:
        settings = read_settings()
        configure_logs(settings.log_level)
        run: Run = options.run
        return run(settings, options)
    except _FAILURES as failure:
        print(f"productgraph: {failure}", file=sys.stderr)
        return 1


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="productgraph",
        description="Takes telemetry events over HTTP and gRPC, and stores them in PostgreSQL.",
        epilog=SETTINGS,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_command(
        commands,
        "serve",
        _serve,
        "Runs the service until SIGTERM or Ctrl-C, which let it answer what it has accepted. SIGHUP"
        " replaces the workers one by one. Without DATABASE_URL it runs a PostgreSQL of its own in"
        " DATA_DIR.",
    )
    migrating = add_command(
        commands,
        "migrate",
        _migrate,
        "Brings the database's tables to what this version needs. Safe to run at any time, and"
        " several times at once.",
    )
    check = "changes nothing, and fails where something would be to do"
    migrating.add_argument("--check", action="store_true", help=check)
    worker = add_command(commands, "worker", _work, "Runs one worker; `serve` starts these.")
    worker.usage = argparse.SUPPRESS
    add_key_commands(commands)
    add_forward_commands(commands)
    add_rejected_commands(commands)
    add_retention_command(commands)
    return parser


def _serve(settings: Settings, _options: argparse.Namespace) -> int:
    def announce(ports: dict[str, int], key: str | None) -> None:
        print(_describe_service(settings, ports, key), flush=True)

    app.run_service(settings, announce)
    return 0


def _describe_service(settings: Settings, ports: dict[str, int], key: str | None) -> str:
    host = settings.host
    places = {
        "host": "localhost" if host in ("0.0.0.0", "::", "127.0.0.1") else host,  # noqa: S104 - compared, not bound
        "http": ports["PORT"],
        "grpc": ports["GRPC_PORT"],
    }
    banner = _BANNER.format(**places)
    if port := ports.get("METRICS_PORT"):
        banner += _METRICS.format(**places, metrics=port)
    if key is None:
        return banner
    return banner + _FIRST_KEY.format(
        **places,
        key=key,
        project=app.DEMO_PROJECT,
        method=_METHOD,
        security="-insecure" if settings.grpc_tls else "-plaintext",
        http_events=_make_example("over HTTP"),
        grpc_events=_make_example("over gRPC"),
    )


def _make_example(title: str) -> str:
    event = {
        "event_id": f"evt_{uuid.uuid4()}",
        "project_id": app.DEMO_PROJECT,
        "session.id": "sess_first",
        "event.type": "page.view",
        "event.timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "page.path": "/hello",
        "page.title": f"Hello {title}",
    }
    return json.dumps({"events": [event]})


def _work(settings: Settings, _options: argparse.Namespace) -> int:
    app.run_worker(settings)
    return 0


def _migrate(settings: Settings, options: argparse.Namespace) -> int:
    with app.opened_database(settings, create=not options.check) as url:
        (check_migrated if options.check else migrate)(open_engine(url))
    return 0
