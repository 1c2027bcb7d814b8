"""`productgraph rejected`: lists, shows and replays the events that validation rejected."""

import click

from server.app.worker import opened_replay
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
from server.events.spelling import spell_event
from server.ingest.replay import Replayed
from server.storage.connection import connected
from server.storage.rejected_events import StoredRejection, list_rejections, read_rejection

_project_option = click.option("--project", help="Only this project's.")


@click.group()
def rejected() -> None:
    """List, show and replay rejected events."""


@rejected.command(name="list")
@_project_option
@limit_option
@json_option
@with_settings
def list_(settings: Settings, project: str | None, limit: int, as_json: bool) -> None:
    """List rejected events, the newest first."""
    with opened_tables(settings) as connection:
        found = list_rejections(connection, project, limit)
    if as_json:
        print_json(rejection.summary for rejection in found)
        return
    for rejection in found:
        click.echo(_describe(rejection))


def _describe(rejection: StoredRejection) -> str:
    return make_printable(
        f"{rejection.id}  {format_moment(rejection.received_at)}  {rejection.protocol}"
        f"  {rejection.project_id}  {rejection.size} bytes  {rejection.reason}"
    )


@rejected.command()
@click.argument("rejection_id", type=NUMBER, metavar="ID")
@with_settings
def show(settings: Settings, rejection_id: int) -> None:
    """Show a rejected event as it was received."""
    with opened_tables(settings) as connection:
        rejection = read_rejection(connection, rejection_id)
    if rejection is None:
        raise Failure(f"no rejected event {rejection_id}")
    click.echo(_describe(rejection))
    if rejection.is_cut:
        click.echo(f"Only its first {len(rejection.event)} bytes were kept.")
    click.echo(make_printable(spell_event(rejection.protocol, rejection.event).rstrip()))


@rejected.command()
@_project_option
@click.option("--all", "choose_all", is_flag=True, help="All of them.")
@click.argument("ids", type=NUMBER, nargs=-1, metavar="[ID]...")
@with_settings
def replay(settings: Settings, project: str | None, choose_all: bool, ids: tuple[int, ...]) -> None:
    """Take rejected events once more.

    They count as events of their project. What is accepted now is stored and forwarded like any
    event, and leaves the list; the others stay, with the reason of today. Run it with the settings
    of the service.
    """
    chosen = choose_ids(ids, choose_all)
    replayed = Replayed()
    with (
        opened_engine(settings) as engine,
        opened_replay(settings, engine) as replay,
        connected(engine) as connection,
    ):
        replay.run(connection, project, chosen, replayed)
    click.echo(f"{len(replayed.accepted)} accepted, {len(replayed.rejected)} rejected again")
    if missing := sorted(set(chosen) - {*replayed.accepted, *replayed.rejected}):
        raise Failure(f"no rejected event {', '.join(map(str, missing))}")
