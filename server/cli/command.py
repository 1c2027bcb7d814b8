"""What every command is made of: its place in the command line, and a database to work on."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from server import app
from server.config import Settings
from server.storage.connection import Connection, Engine, connected, open_engine, transactional
from server.storage.migrate import check_migrated

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[Settings, argparse.Namespace], int]

SETTINGS = "Settings come from environment variables; OPERATIONS.md lists them all."


def add_command(commands: Commands, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """Adds a command that `run` carries out; the first sentence of `text` is its summary."""
    summary = text.split(". ")[0].rstrip(".")
    command = commands.add_parser(name, help=summary, description=text, epilog=SETTINGS)
    command.set_defaults(run=run)
    return command


def add_group(commands: Commands, name: str, text: str) -> Commands:
    """Adds a command that has commands of its own, one of which must be given."""
    group = commands.add_parser(name, help=text, description=text, epilog=SETTINGS)
    return group.add_subparsers(metavar="ACTION", required=True)


@contextmanager
def opened_engine(settings: Settings) -> Iterator[Engine]:
    """An engine of a database with this version's tables; raises DatabaseError."""
    with app.opened_database(settings) as url:
        engine = open_engine(url)
        check_migrated(engine)
        yield engine


@contextmanager
def opened_tables(settings: Settings) -> Iterator[Connection]:
    """A connection in a transaction that is committed at the end."""
    with (
        opened_engine(settings) as engine,
        connected(transactional(engine)) as connection,
        connection.begin(),
    ):
        yield connection
