"""`productgraph forward`: forwards events, shows how that stands, deals with dead ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import click
from google.protobuf.json_format import MessageToJson

from productgraph.v1.event_pb2 import Event
from server.app.forwarder import run_forwarder
from server.app.parts import load_block_list
from server.cli.command import (
    NUMBER,
    Failure,
    choose_ids,
    format_moment,
    json_option,
    limit_option,
    make_printable,
    opened_engine,
    opened_tables,
    print_json,
    with_settings,
)
from server.config import Settings
from server.protocols import GRPC
from server.storage.connection import Connection, connected
from server.storage.dead_events import DeadEvent, find_dead, list_dead, purge_dead, retry_dead
from server.storage.lanes import LaneStatus, forget_trouble, read_status
from server.storage.outbox import count_waiting, purge_waiting

# A forwarder says every ten seconds that it is there, unless the database does not answer.
_SILENCE = timedelta(seconds=60)

_provider_option = click.option("--provider", help="Only this provider's.")
_all_option = click.option("--all", "choose_all", is_flag=True, help="All of them.")
_ids_argument = click.argument("ids", type=NUMBER, nargs=-1, metavar="[ID]...")


@click.group(invoke_without_command=True)
@click.pass_context
def forward(context: click.Context) -> None:
    """Forward stored events to analytics providers.

    Without a command it forwards to the enabled providers, until SIGTERM or Ctrl-C. `serve` runs
    FORWARDERS of these if analytics is enabled; any number may run, on any number of machines.
    """
    if context.invoked_subcommand is None:
        _run_forwarder()


@with_settings
def _run_forwarder(settings: Settings) -> None:
    run_forwarder(settings)


@forward.command()
@json_option
@with_settings
def status(settings: Settings, as_json: bool) -> None:
    """Show how far each provider has come."""
    with opened_tables(settings) as connection:
        lanes = read_status(connection)
    if as_json:
        print_json(map(asdict, lanes))
        return
    click.echo(
        f"{'PROVIDER':10}  {'PENDING':>9}  {'OLDEST':>9}  {'DELIVERED':>11}  {'DEAD':>7}"
        f"  {'SEEN':>9}  STATE"
    )
    for lane in lanes:
        for line in _describe_lane(lane, datetime.now(UTC)):
            click.echo(make_printable(line))


def _describe_lane(lane: LaneStatus, now: datetime) -> Iterator[str]:
    """Yield the lines about a lane: its numbers, and what went wrong at last if it is not well."""
    age, seen = _describe_age(lane.oldest_at, now), _describe_age(lane.seen_at, now)
    counts = f"{lane.pending:9}  {age:>9}  {lane.delivered:11}  {lane.dead:7}  {seen:>9}"
    yield f"{lane.provider:10}  {counts}  {_describe_state(lane, now)}"
    if lane.failing_since is None:
        return
    if lane.last_error and lane.last_error_at and not lane.stopped_reason:
        yield f"            last error at {format_moment(lane.last_error_at)}: {lane.last_error}"
    if lane.next_try_at and lane.next_try_at > now:
        yield f"            next try in {(lane.next_try_at - now).total_seconds():.0f} s"


def _describe_state(lane: LaneStatus, now: datetime) -> str:
    if lane.stopped_reason:
        return f"stopped: {lane.stopped_reason}"
    if lane.seen_at is None or now - lane.seen_at > _SILENCE:
        return "no forwarder"
    if lane.failing_since:
        return f"failing since {format_moment(lane.failing_since)}"
    return "forwarding"


def _describe_age(moment: datetime | None, now: datetime) -> str:
    return f"{max(0.0, (now - moment).total_seconds()):.0f} s" if moment else "-"


@forward.command(name="purge")
@click.option("--provider", required=True, help="The provider, such as one that is switched off.")
@click.option("--yes", is_flag=True, help="Delete them; without it, only their number is shown.")
@with_settings
def purge_lane(settings: Settings, provider: str, yes: bool) -> None:
    """Delete the events that wait for a provider.

    They stay stored, and are forwarded to the other providers, but never to this one.
    """
    with opened_engine(settings) as engine, connected(engine) as connection:
        if not yes:
            count = count_waiting(connection, provider)
            click.echo(f"{count} events wait for {provider}; --yes deletes them")
            return
        deleted = sum(iter(lambda: purge_waiting(connection, provider), None))
        forget_trouble(connection, provider)
    click.echo(f"{deleted} deleted")


@forward.group()
def dead() -> None:
    """List, show, retry and purge dead events.

    They are those that a provider refused for good, or that could not be delivered in time.
    """


@dead.command(name="list")
@_provider_option
@limit_option
@json_option
@with_settings
def list_(settings: Settings, provider: str | None, limit: int, as_json: bool) -> None:
    """List dead events, the newest first."""
    with opened_tables(settings) as connection:
        found = list_dead(connection, provider, limit)
    if as_json:
        print_json(map(_to_json, found))
        return
    for letter in found:
        click.echo(_describe_dead(letter))


def _to_json(letter: DeadEvent) -> dict[str, object]:
    event_id = Event.FromString(letter.event).event_id
    return {name: value for name, value in asdict(letter).items() if name != "event"} | {
        "event_id": event_id
    }


def _describe_dead(letter: DeadEvent) -> str:
    event = Event.FromString(letter.event)
    return make_printable(
        f"{letter.id}  {format_moment(letter.died_at)}  {letter.provider}"
        f"  {letter.project_id}  {event.event_id!r}  {letter.reason}"
    )


@dead.command()
@click.argument("dead_id", type=NUMBER, metavar="ID")
@with_settings
def show(settings: Settings, dead_id: int) -> None:
    """Show a dead event, the reason and the provider's answer."""
    with opened_tables(settings) as connection:
        found = find_dead(connection, [dead_id])
    if not found:
        raise Failure(f"no dead event {dead_id}")
    [letter] = found
    click.echo(_describe_dead(letter))
    if letter.answer:
        click.echo(make_printable(f"Its answer: {letter.answer}"))
    # By the names on the wire: what is shown can be sent in again.
    spelled = MessageToJson(Event.FromString(letter.event), ensure_ascii=False)
    click.echo(make_printable(spelled))


@dead.command()
@_provider_option
@_all_option
@_ids_argument
@with_settings
def retry(settings: Settings, provider: str | None, choose_all: bool, ids: tuple[int, ...]) -> None:
    """Put dead events back into the queue.

    Those of blocked persons are deleted instead.
    """

    def revive(connection: Connection, provider: str | None, ids: Sequence[int]) -> int:
        find_blocked = load_block_list(settings, connection)

        def is_dropped(project_id: str, event: bytes) -> bool:
            blocked = find_blocked(project_id)
            return blocked is not None and blocked.may_own(GRPC, event)

        return retry_dead(connection, provider, ids, is_dropped)

    _change(settings, revive, provider, choose_ids(ids, choose_all), "put back into the queue")


@dead.command()
@_provider_option
@_all_option
@_ids_argument
@with_settings
def purge(settings: Settings, provider: str | None, choose_all: bool, ids: tuple[int, ...]) -> None:
    """Delete dead events."""
    _change(settings, purge_dead, provider, choose_ids(ids, choose_all), "deleted")


def _change(
    settings: Settings,
    change: Callable[[Connection, str | None, Sequence[int]], int],
    provider: str | None,
    ids: list[int],
    done: str,
) -> None:
    """Change dead events, and fail if some of those that were named are not there."""
    with opened_tables(settings) as connection:
        known = {letter.id for letter in find_dead(connection, ids, provider)}
        count = change(connection, provider, ids)
    click.echo(f"{count} {done}")
    if missing := sorted(set(ids) - known):
        raise Failure(f"no dead event {', '.join(map(str, missing))}")
