"""The command line `productgraph`."""

import argparse
import sys
from collections.abc import Sequence

from server import app
from server.cli.banner import describe_service
from server.cli.command import SETTINGS, Run, add_command
from server.cli.forward import add_forward_commands
from server.cli.keys import add_key_commands
from server.cli.rejected import add_rejected_commands
from server.cli.retention import add_retention_command
from server.config import InvalidSetting, Settings, read_settings
from server.logs import configure_logs
from server.processes.ports import PortTaken
from server.processes.supervisor import WorkerFailed
from server.storage.connection import DatabaseError, open_engine
from server.storage.embedded import EmbeddedPostgresError
from server.storage.migrate import check_migrated, migrate

_FAILURES = (InvalidSetting, DatabaseError, EmbeddedPostgresError, PortTaken, WorkerFailed)


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
        print(describe_service(settings, ports, key), flush=True)

    app.run_service(settings, announce)
    return 0


def _work(settings: Settings, _options: argparse.Namespace) -> int:
    app.run_worker(settings)
    return 0


def _migrate(settings: Settings, options: argparse.Namespace) -> int:
    with app.opened_database(settings, create=not options.check) as url:
        (check_migrated if options.check else migrate)(open_engine(url))
    return 0
