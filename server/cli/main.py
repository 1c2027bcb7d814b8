"""The command line `productgraph`."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import click
from click.shell_completion import get_completion_class

from server.app.parts import opened_database
from server.cli.banner import describe_service
from server.cli.command import Failure, warn_of_strays, with_settings
from server.config import InvalidSetting, Settings
from server.processes.ports import PortTaken
from server.processes.supervisor import WorkerFailed
from server.storage.accounts import EmbeddedPostgresError
from server.storage.connection import open_engine
from server.storage.errors import DatabaseError
from server.storage.migrate import check_indexed, check_migrated
from server.storage.migrate import migrate as migrate_tables
from server.storage.partitions import add_months_patiently

_NAME = "productgraph"
_COMPLETION_VARIABLE = "_PRODUCTGRAPH_COMPLETE"
# Each is the name of its module, and of the command in it.
MODULES = (
    "config",
    "distribute",
    "doctor",
    "events",
    "forward",
    "keys",
    "person",
    "psql",
    "quota",
    "rejected",
    "retention",
    "usage",
)
_FAILURES = (
    DatabaseError,
    EmbeddedPostgresError,
    Failure,
    InvalidSetting,
    PortTaken,
    WorkerFailed,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return its exit code: 0, 1 if it failed, 2 if it was called wrongly."""
    try:
        code = productgraph.main(arguments, _NAME, _COMPLETION_VARIABLE, standalone_mode=False)
    except click.ClickException as misuse:
        misuse.show()
        return misuse.exit_code
    except click.Abort:
        click.echo(f"{_NAME}: interrupted", err=True)
        return 1
    except _FAILURES as failure:
        click.echo(f"{_NAME}: {failure}", err=True)
        return 1
    return code or 0


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        try:
            number = version("productgraph-ingestion")
        except PackageNotFoundError:  # run from a folder
            number = "unknown"
        click.echo(f"{_NAME} {number}")
        context.exit()


class _Commands(click.Group):
    """Imports the module of a command only when that is called.

    So a worker, which is a command too, imports what it needs and no more.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *MODULES])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in MODULES:
            return super().get_command(context, name)
        command: click.Command = getattr(import_module(f"server.cli.{name}"), name)
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Settings come from environment variables: see productgraph config and OPERATIONS.md.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def productgraph() -> None:
    """Take telemetry events over HTTP and gRPC, and store them in PostgreSQL."""


@productgraph.command()
@with_settings
def serve(settings: Settings) -> None:
    """Run the service.

    It runs until SIGTERM or Ctrl-C, and then answers what it has accepted. SIGHUP replaces the
    workers one by one. Without DATABASE_URL it runs a PostgreSQL of its own in DATA_DIR.
    """
    from server.app.parent import run_service

    def announce(ports: dict[str, int], key: str | None) -> None:
        click.echo(describe_service(settings, ports, key))

    warn_of_strays()
    run_service(settings, announce)


@productgraph.command(hidden=True)
@with_settings
def worker(settings: Settings) -> None:
    """Run one worker, as `serve` does."""
    from server.app.worker import run_worker

    run_worker(settings)


@productgraph.command()
@click.option("--check", is_flag=True, help="Change nothing, and fail if something is to be done.")
@with_settings
def migrate(settings: Settings, check: bool) -> None:
    """Bring the tables to what this version needs.

    Adds the coming months' partitions as well. Safe to run at any time, and several times at once.
    """
    with opened_database(settings, create=not check) as url:
        engine = open_engine(url)
        if check:
            check_migrated(engine)
            check_indexed(engine)
        else:
            migrate_tables(engine)
            add_months_patiently(engine, datetime.now(UTC).date())


@productgraph.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands.

    For bash: eval "$(productgraph completion bash)"
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(productgraph, {}, _NAME, _COMPLETION_VARIABLE).source())
