"""`productgraph events`: shows, finds, counts and exports stored events."""

import csv
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import orjson

from server.cli.command import (
    Failure,
    json_option,
    make_printable,
    opened_engine,
    print_json,
    with_settings,
)
from server.config import Settings
from server.events.schema import EVENT_SCHEMA
from server.storage.connection import connected
from server.storage.event_queries import (
    GROUPINGS,
    QUERY_SECONDS,
    EventFilter,
    EventQueries,
    StoredEvent,
)
from server.storage.fates import (
    DEAD,
    UNKNOWN,
    WAITING,
    ProviderFate,
    describe_stored,
    find_fates,
)
from server.storage.rejected_events import find_oldest_rejection, find_rejections

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_POLL_SECONDS = 1.0
# How many events of the last few seconds `--follow` looks at, each second.
_FOLLOWED_AT_ONCE = 10_000


class Moment(click.ParamType[datetime]):
    """A moment: RFC 3339 such as 2026-01-15 or 2026-01-15T10:30Z, or an age such as 7d."""

    name = "time"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> datetime:
        """Return the moment; one without an offset is in UTC."""
        if isinstance(value, datetime):
            return value
        try:
            if age := re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", value, re.ASCII):
                return datetime.now(UTC) - timedelta(**{_UNITS[age[2]]: int(age[1])})
            moment = datetime.fromisoformat(value)
            return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        except (ValueError, OverflowError):
            self.fail(
                f"must be a time such as 2026-01-15T10:30Z or an age such as 7d, is {value!r}",
                parameter,
                context,
            )


class Groups(click.ParamType[list[str]]):
    """Names of GROUPINGS, with commas between."""

    name = ",".join(GROUPINGS)

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> list[str]:
        """Return the names without repetitions."""
        names = list(dict.fromkeys(value.split(",")))
        if not set(names) <= set(GROUPINGS):
            self.fail(f"must be some of {', '.join(GROUPINGS)}, is {value!r}", parameter, context)
        return names


project_option = click.option("--project", help="Only this project's.")
_type_option = click.option("--type", "event_type", metavar="TYPE", help="Only of this type.")
_since_option = click.option(
    "--since", type=Moment(), default="7d", show_default=True, help="The earliest event.timestamp."
)
timeout_option = click.option(
    "--timeout",
    type=click.IntRange(1, 86_400),
    default=QUERY_SECONDS,
    show_default=True,
    help="After how many seconds to end a query.",
)
until_option = click.option("--until", type=Moment(), help="Only with an event.timestamp before.")


@click.group()
def events() -> None:
    """Show, find, count and export stored events.

    Times are those of events (event.timestamp), except for `tail`, which goes by arrival.
    """


@contextmanager
def opened_queries(settings: Settings, timeout: int) -> Iterator[EventQueries]:
    """Open a connection for queries, each of which may take `timeout` seconds."""
    with opened_engine(settings) as engine, connected(engine) as connection:
        yield EventQueries(connection, timeout)


@events.command()
@project_option
@_type_option
@click.option("--session", help="Only of this session.")
@click.option("--user", help="Only of this user.")
@click.option(
    "--since", type=Moment(), default="1d", show_default=True, help="The earliest arrival."
)
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="How many."
)
@click.option("--follow", "-f", is_flag=True, help="Go on with those that arrive, until Ctrl-C.")
@timeout_option
@json_option
@with_settings
def tail(
    settings: Settings,
    project: str | None,
    event_type: str | None,
    session: str | None,
    user: str | None,
    since: datetime,
    limit: int,
    follow: bool,
    timeout: int,
    as_json: bool,
) -> None:
    """Show the events that arrived last.

    They come in the order of their arrival, the last one at the end.
    """
    wanted = EventFilter(project, event_type, session, user)
    show = _print_json if as_json else _print_lines
    with opened_queries(settings, timeout) as queries:
        now = queries.read_now()
        found = queries.find_newest(wanted, now, since, limit)
        show(reversed(found))
        if follow:
            # An event can be seen once its transaction has committed, which takes up to this long.
            delay = timedelta(seconds=settings.request_timeout_seconds + 1.0)
            with suppress(KeyboardInterrupt):
                _follow(queries, wanted, delay, show, {event.key for event in found}, now)


def _follow(
    queries: EventQueries,
    wanted: EventFilter,
    delay: timedelta,
    show: Callable[[Iterable[StoredEvent]], None],
    shown: set[tuple[str, datetime, str]],
    start: datetime,
) -> None:
    shown_at = dict.fromkeys(shown, start)
    while True:
        time.sleep(_POLL_SECONDS)
        now = queries.read_now()
        after = max(start - delay, now - delay - timedelta(seconds=_POLL_SECONDS))
        found = queries.find_arrived(wanted, after, now, _FOLLOWED_AT_ONCE)
        show(event for event in reversed(found) if event.key not in shown_at)
        if len(found) == _FOLLOWED_AT_ONCE:
            click.echo("more arrive than can be shown: narrow it by options", err=True)
        shown_at |= {event.key: now for event in found}
        shown_at = {key: moment for key, moment in shown_at.items() if moment >= now - 2 * delay}


def _print_json(found: Iterable[StoredEvent]) -> None:
    for event in found:
        click.echo(_encode(event))


def _encode(event: StoredEvent) -> bytes:
    return orjson.dumps(event.fields, option=orjson.OPT_UTC_Z)


def _print_lines(found: Iterable[StoredEvent]) -> None:
    for event in found:
        click.echo(describe_event(event))


def describe_event(event: StoredEvent) -> str:
    """Return an event as one line for a terminal: arrival, project, type, id, what it is about."""
    fields = event.fields
    arrival = f"{event.received_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    names = ("user.id", "page.path", "ui.component.name", "api.path", "error.type")
    about = [f"{name}={fields[name]}" for name in names if fields.get(name)]
    line = [arrival, *(fields[name] for name in ("project_id", "event.type", "event_id")), *about]
    return make_printable("  ".join(line)).replace("\n", "\\n")


@events.command()
@click.argument("event_id", metavar="ID")
@project_option
@_since_option
@timeout_option
@json_option
@with_settings
def show(
    settings: Settings,
    event_id: str,
    project: str | None,
    since: datetime,
    timeout: int,
    as_json: bool,
) -> None:
    """Show an event and its fate.

    It was stored, rejected, or is not among what is kept. If it was stored: whether each provider
    has it, will get it, or refused it.
    """
    with opened_queries(settings, timeout) as queries:
        found = queries.find_by_id(event_id, project, since)
        with queries.transaction() as connection:
            fates = [find_fates(connection, event) for event in found]
            rejections = find_rejections(connection, event_id, project)
        missing = "" if found or rejections else _explain_absence(queries, event_id, project, since)
    if missing:
        raise Failure(missing)
    for event, providers in zip(found, fates, strict=True):
        click.echo(
            orjson.dumps(describe_stored(event, providers), option=orjson.OPT_UTC_Z)
            if as_json
            else _describe_fate(event, providers)
        )
    for rejection in rejections:
        click.echo(
            orjson.dumps({"rejected": rejection.summary}, option=orjson.OPT_UTC_Z)
            if as_json
            else make_printable(
                f"rejected   number {rejection.id} in `rejected`, received"
                f" {_format_time(rejection.received_at)}: {rejection.reason}"
            )
        )


def _explain_absence(
    queries: EventQueries, event_id: str, project: str | None, since: datetime
) -> str:
    stored = queries.find_oldest_time(project)
    with queries.transaction() as connection:
        rejected = find_oldest_rejection(connection)
    kept = f"there are events since {_format_time(stored)}" if stored else "there are no events"
    kept += f", and rejections since {_format_time(rejected)}" if rejected else ", nor rejections"
    return make_printable(
        f"no event {event_id!r} of {_format_time(since)} or later (--since), and none that was"
        f" rejected: {kept}"
    )


def _describe_fate(event: StoredEvent, fates: Sequence[ProviderFate]) -> str:
    lines = [f"stored     received {_format_time(event.received_at)}, in {event.partition}"]
    lines += [f"{fate.provider:9}  {_explain(fate)}" for fate in fates]
    if not fates:
        lines.append("forwarded  no: no provider is enabled")
    spelled = orjson.dumps(orjson.loads(_encode(event)), option=orjson.OPT_INDENT_2).decode()
    return make_printable("\n".join([*lines, spelled]))


def _explain(fate: ProviderFate) -> str:
    details = fate.details
    if fate.state == WAITING:
        error = f"; the provider's last error: {details['last_error']}"
        tries = f"{details['tries']} tries, next {_format_time(details['next_try_at'])}"
        return f"waiting: {tries}{error if details['last_error'] else ''}"
    if fate.state == DEAD:
        answer = f"; its answer: {details['answer']}" if details["answer"] else ""
        return f"dead: number {details['id']} in `forward dead`: {details['reason']}{answer}"
    if fate.state == UNKNOWN:
        known = (
            f"known for events received since {_format_time(details['since'])}"
            if "since" in details
            else f"known for events received after {_format_time(details['until'])}"
        )
        return f"delivered, or {details['why']}: {known}"
    return "delivered"


def _format_time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


@events.command()
@click.option(
    "--by",
    type=Groups(),
    default="project,type",
    show_default=True,
    help="What to group by.",
)
@project_option
@_type_option
@_since_option
@until_option
@timeout_option
@json_option
@with_settings
def count(
    settings: Settings,
    by: list[str],
    project: str | None,
    event_type: str | None,
    since: datetime,
    until: datetime | None,
    timeout: int,
    as_json: bool,
) -> None:
    """Count events by project, type or day (UTC)."""
    with opened_queries(settings, timeout) as queries:
        wanted = EventFilter(project, event_type)
        counts = queries.count(by, wanted, since, until or latest())
    print_counts(by, counts, as_json=as_json)


def print_counts(by: Sequence[str], counts: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print numbers of events as a table, or as one JSON object a line."""
    if as_json:
        print_json(counts)
        return
    rows = [[*(make_printable(row[name]) for name in by), str(row["events"])] for row in counts]
    _print_table([name.upper() for name in (*by, "events")], rows)


def latest() -> datetime:
    """Return a moment after all events."""
    return datetime.max.replace(tzinfo=UTC)


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose last column has numbers."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        *texts, number = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join([*texts, number.strip().rjust(widths[-1])]))


@events.command()
@project_option
@_type_option
@click.option("--since", type=Moment(), required=True, help="The earliest event.timestamp.")
@until_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "csv"]),
    default="jsonl",
    show_default=True,
    help="One JSON object a line, or CSV.",
)
@timeout_option
@with_settings
def export(
    settings: Settings,
    project: str | None,
    event_type: str | None,
    since: datetime,
    until: datetime | None,
    form: str,
    timeout: int,
) -> None:
    """Write events to standard output.

    They come by project and time. Each line of JSON can be sent in again over HTTP, as one of
    `events`; CSV has received_at as well. The service goes on meanwhile.
    """
    write = _write_json if form == "jsonl" else _write_csv
    wanted, end = EventFilter(project, event_type), until or latest()
    with opened_queries(settings, timeout) as queries:
        found = queries.read(wanted, since, end)
        if sys.stderr.isatty() and not sys.stdout.isatty():
            expected = queries.estimate(wanted, since, end)
            with click.progressbar(
                found, expected, show_pos=True, file=sys.stderr, update_min_steps=10_000
            ) as shown:
                write(shown)
        else:
            write(found)


def _write_json(found: Iterable[StoredEvent]) -> None:
    output = sys.stdout.buffer
    for event in found:
        output.write(_encode(event) + b"\n")
    output.flush()


def _write_csv(found: Iterable[StoredEvent]) -> None:
    names = [field.wire_name for field in EVENT_SCHEMA.fields]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*names, "received_at"])
    for event in found:
        cells = [_to_cell(event.fields.get(name)) for name in names]
        writer.writerow([*cells, _to_cell(event.received_at)])


def _to_cell(value: object) -> object:
    if isinstance(value, datetime | orjson.Fragment):
        return orjson.dumps(value, option=orjson.OPT_UTC_Z).decode().strip('"')
    return value
