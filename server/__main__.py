"""The command line: `productgraph`, or `python -m server`."""

import argparse
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeAlias

from productgraph.v1.event_pb2 import Event
from server import app, keys, outbox
from server.config import InvalidSetting, Settings, read_settings
from server.database import Connection, DatabaseError, connected, open_engine, transactional
from server.embedded import EmbeddedPostgresError
from server.logs import configure_logs
from server.migration import check_migrated, migrate
from server.workers import PortTaken, WorkerFailed

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_Run = Callable[[Settings, argparse.Namespace], int]

_SETTINGS = "Settings come from environment variables; README.md lists them all."
_FAILURES = (InvalidSetting, DatabaseError, EmbeddedPostgresError, PortTaken, WorkerFailed)

_BANNER = """\
ProductGraph event ingestion
  HTTP  http://{host}:{http}
  gRPC  {host}:{grpc}
"""
_FIRST_KEY = """
A first API key, for project {project}. It is shown this once:
  {key}

Send an event over HTTP:
  curl -i -X POST http://{host}:{http}/v1/events \\
    -H 'Content-Type: application/json' -H 'X-PG-API-Key: {key}' \\
    -d '{http_events}'

and one over gRPC:
  grpcurl -plaintext -H 'x-pg-api-key: {key}' \\
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
        run: _Run = options.run
        return run(settings, options)
    except _FAILURES as failure:
        print(f"productgraph: {failure}", file=sys.stderr)
        return 1


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="productgraph",
        description="Takes telemetry events over HTTP and gRPC, and stores them in PostgreSQL.",
        epilog=_SETTINGS,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_command(
        commands,
        "serve",
        _serve,
        "Runs the service until SIGTERM or Ctrl-C, which let it answer what it has accepted. SIGHUP"
        " replaces the workers one by one. Without DATABASE_URL it runs a PostgreSQL of its own in"
        " DATA_DIR.",
    )
    _add_command(
        commands,
        "migrate",
        _migrate,
        "Brings the database's tables to what this version needs. Safe to run at any time, and"
        " several times at once.",
    )
    worker = _add_command(commands, "worker", _work, "Runs one worker; `serve` starts these.")
    worker.usage = argparse.SUPPRESS
    _add_key_commands(commands)
    _add_forward_commands(commands)
    return parser


def _add_key_commands(commands: _Commands) -> None:
    text = "Makes, lists and revokes API keys."
    parser = commands.add_parser("keys", help=text, description=text, epilog=_SETTINGS)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    create = _add_command(
        actions,
        "create",
        _create_key,
        "Makes an API key and prints it, and nothing else. It works at once, and cannot be shown"
        " again. A project can have several, to change from one to the next.",
    )
    create.add_argument("--project", required=True, help="the project that its events belong to")
    create.add_argument("--name", default="", help="what it is for, for your own memory")
    _add_command(actions, "list", _list_keys, "Lists all API keys, without the keys themselves.")
    revoke = _add_command(
        actions, "revoke", _revoke_key, "Revokes an API key; a running service refuses it in 30 s."
    )
    revoke.add_argument("id", type=int, help="its number in `productgraph keys list`")


def _add_forward_commands(commands: _Commands) -> None:
    forward = _add_command(
        commands,
        "forward",
        _forward,
        "Forwards stored events to the enabled analytics providers, until SIGTERM or Ctrl-C."
        " `serve` runs one of these when analytics is enabled; any number may run, on any number of"
        " machines.",
    )
    actions = forward.add_subparsers(metavar="ACTION")
    _add_command(actions, "status", _show_forwarding, "Shows how far each provider has come.")
    text = "Lists, retries and purges the events that a provider refused for good."
    dead = actions.add_parser("dead", help=text, description=text, epilog=_SETTINGS)
    letters = dead.add_subparsers(metavar="ACTION", required=True)
    listing = _add_command(letters, "list", _list_dead, "Lists dead events, the newest first.")
    listing.add_argument("--limit", type=int, default=50, help="how many (50)")
    listing.add_argument("--provider", help="only this provider's")
    for name, run, summary in (
        ("retry", _retry_dead, "Puts dead events back into the queue."),
        ("purge", _purge_dead, "Deletes dead events."),
    ):
        command = _add_command(letters, name, run, summary)
        command.add_argument("--provider", help="only this provider's")
        chosen = command.add_mutually_exclusive_group(required=True)
        chosen.add_argument("--all", action="store_true", help="all of them")
        chosen.add_argument("ids", type=int, nargs="*", default=[], help="their numbers")


def _add_command(commands: _Commands, name: str, run: _Run, text: str) -> argparse.ArgumentParser:
    summary = text.split(". ")[0].rstrip(".")
    command = commands.add_parser(name, help=summary, description=text, epilog=_SETTINGS)
    command.set_defaults(run=run)
    return command


def _serve(settings: Settings, _options: argparse.Namespace) -> int:
    def announce(ports: dict[str, int], key: str | None) -> None:
        print(_describe_service(settings.host, ports, key), flush=True)

    app.run_service(settings, announce)
    return 0


def _describe_service(host: str, ports: dict[str, int], key: str | None) -> str:
    places = {
        "host": "localhost" if host in ("0.0.0.0", "::", "127.0.0.1") else host,  # noqa: S104 - compared, not bound
        "http": ports["PORT"],
        "grpc": ports["GRPC_PORT"],
    }
    if key is None:
        return _BANNER.format(**places)
    return (_BANNER + _FIRST_KEY).format(
        **places,
        key=key,
        project=app.DEMO_PROJECT,
        method=_METHOD,
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


def _migrate(settings: Settings, _options: argparse.Namespace) -> int:
    with app.opened_database(settings, create=True) as url:
        migrate(open_engine(url))
    return 0


def _create_key(settings: Settings, options: argparse.Namespace) -> int:
    with _opened_tables(settings) as connection:
        key = keys.create_key(connection, options.project, options.name)
    print(key)
    return 0


def _list_keys(settings: Settings, _options: argparse.Namespace) -> int:
    with _opened_tables(settings) as connection:
        known = keys.list_keys(connection)
    print(f"{'ID':>4}  {'PROJECT':20}  {'NAME':20}  {'CREATED':16}  {'LAST USED':16}  REVOKED")
    for key in known:
        moments = (key.created_at, key.last_used_at, key.revoked_at)
        created, used, revoked = (f"{m:%Y-%m-%d %H:%M}" if m else "-" for m in moments)
        print(f"{key.id:4}  {key.project_id:20}  {key.name:20}  {created:16}  {used:16}  {revoked}")
    return 0


def _revoke_key(settings: Settings, options: argparse.Namespace) -> int:
    with _opened_tables(settings) as connection:
        revoked = keys.revoke_key(connection, options.id)
    if revoked:
        return 0
    print(f"productgraph: no key {options.id} that is not revoked", file=sys.stderr)
    return 1


def _forward(settings: Settings, _options: argparse.Namespace) -> int:
    app.run_forwarder(settings)
    return 0


def _show_forwarding(settings: Settings, _options: argparse.Namespace) -> int:
    with _opened_tables(settings) as connection:
        lanes = outbox.read_status(connection)
    print(f"{'PROVIDER':10}  {'PENDING':>9}  {'OLDEST':>9}  {'DELIVERED':>11}  {'DEAD':>7}  STATE")
    for lane in lanes:
        age = (
            f"{(datetime.now(UTC) - lane.oldest_at).total_seconds():.0f} s"
            if lane.oldest_at
            else "-"
        )
        state = f"stopped: {lane.stopped_reason}" if lane.stopped_reason else "forwarding"
        counts = f"{lane.pending:9}  {age:>9}  {lane.delivered:11}  {lane.dead:7}"
        print(f"{lane.provider:10}  {counts}  {state}")
    return 0


def _list_dead(settings: Settings, options: argparse.Namespace) -> int:
    with _opened_tables(settings) as connection:
        for letter in outbox.list_dead(connection, options.provider, options.limit):
            event = Event.FromString(letter.event)
            print(
                f"{letter.id}  {letter.died_at:%Y-%m-%d %H:%M}  {letter.provider}"
                f"  {letter.project_id}  {event.event_id!r}  {letter.reason}"
            )
    return 0


def _retry_dead(settings: Settings, options: argparse.Namespace) -> int:
    with _opened_tables(settings) as connection:
        count = outbox.retry_dead(connection, options.provider, options.ids)
    print(f"{count} put back into the queue")
    return 0


def _purge_dead(settings: Settings, options: argparse.Namespace) -> int:
    with _opened_tables(settings) as connection:
        count = outbox.purge_dead(connection, options.provider, options.ids)
    print(f"{count} deleted")
    return 0


@contextmanager
def _opened_tables(settings: Settings) -> Iterator[Connection]:
    with app.opened_database(settings) as url:
        engine = open_engine(url)
        check_migrated(engine)
        with connected(transactional(engine)) as connection, connection.begin():
            yield connection


if __name__ == "__main__":
    sys.exit(main())
