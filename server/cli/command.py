"""What commands share: settings, the database, failures, options, and how lists are printed."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Concatenate, ParamSpec

import click
import orjson

from server.app.parts import opened_database
from server.config import Settings, find_strays, read_settings
from server.events.schema import EVENT_SCHEMA
from server.logs import configure_logs
from server.storage.connection import Connection, Engine, connected, open_engine
from server.storage.migrate import check_migrated

P = ParamSpec("P")

_log = logging.getLogger("productgraph")

# PostgreSQL's bigint, in which every table numbers its rows.
NUMBER = click.IntRange(1, 2**63 - 1)
limit_option = click.option(
    "--limit", type=click.IntRange(1, 2**31 - 1), default=50, show_default=True, help="How many."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object a line instead."
)


class ProjectId(click.ParamType[str]):
    """The id of a project, as an event can have it."""

    name = "project"

    def convert(
        self, value: str, parameter: click.Parameter | None, context: click.Context | None
    ) -> str:
        """Return the id, or fail with what is wrong with it."""
        [field] = [field for field in EVENT_SCHEMA.fields if field.rules.matches_api_key]
        limit = field.rules.max_bytes
        if not value or len(value.encode(errors="replace")) > limit or not value.isprintable():
            self.fail(f"must be 1 to {limit} bytes of printable text", parameter, context)
        return value


class Failure(Exception):
    """A command cannot do what was asked; the text is one line."""


def with_settings(run: Callable[Concatenate[Settings, P], None]) -> Callable[P, None]:
    """Read the settings and set up the logs when a command runs, not when it is explained."""

    @wraps(run)
    def run_with_settings(*args: P.args, **options: P.kwargs) -> None:
        settings = read_settings()
        configure_logs(settings.log_level)
        run(settings, *args, **options)

    return run_with_settings


def warn_of_strays() -> None:
    """Warn of each variable that is nearly a setting: it has no effect."""
    for name, meant in find_strays():
        _log.warning("%s is not a setting; did you mean %s?", name, meant)


@contextmanager
def opened_engine(settings: Settings) -> Iterator[Engine]:
    """Open an engine of a database with this version's tables. Raises DatabaseError."""
    with opened_database(settings) as url:
        engine = open_engine(url)
        check_migrated(engine)
        yield engine


@contextmanager
def opened_tables(settings: Settings) -> Iterator[Connection]:
    """Open a connection in a transaction that is committed at the end."""
    with opened_engine(settings) as engine, connected(engine) as connection:
        yield connection


def choose_ids(ids: tuple[int, ...], choose_all: bool) -> list[int]:
    """Return the numbers, or none for --all. Raises UsageError unless one of both is given."""
    if bool(ids) == choose_all:
        raise click.UsageError("give the numbers of events, or --all")
    return list(ids)


def print_json(rows: Iterable[Mapping[str, object]]) -> None:
    """Print each row as one line of JSON."""
    for row in rows:
        click.echo(orjson.dumps(row, option=orjson.OPT_UTC_Z))


def format_moment(moment: datetime | None) -> str:
    """Return a moment to the minute; `-` if there is none."""
    return f"{moment:%Y-%m-%d %H:%M}" if moment else "-"


def make_printable(text: str) -> str:
    """Escape all that a terminal would obey."""
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )
