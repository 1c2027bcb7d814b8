"""`productgraph quota`: how many events a project may send in a day and in a month."""

from datetime import UTC, datetime, timedelta

import click

from server.caller import Quota
from server.cli.command import (
    Failure,
    ProjectId,
    format_moment,
    json_option,
    make_printable,
    opened_tables,
    print_json,
    with_settings,
)
from server.config import Settings
from server.storage.quotas import (
    Standing,
    find_quota,
    list_standings,
    list_uses,
    set_quota,
)

_HIGHEST = 10**15
# Stands for an option that was not given, where None lifts the limit.
_UNCHANGED = -1


class _Events(click.ParamType[int | None]):
    name = "events"

    def convert(
        self, value: str | int, parameter: click.Parameter | None, context: click.Context | None
    ) -> int | None:
        if isinstance(value, int):
            return value
        if value.lower() == "off":
            return None
        if not (value.isascii() and value.isdigit() and 1 <= int(value[:20]) <= _HIGHEST):
            text = f"must be off or a number of events, from 1 to {_HIGHEST}, is {value!r}"
            self.fail(text, parameter, context)
        return int(value)


_project_option = click.option("--project", type=ProjectId(), required=True, help="The project.")


@click.group()
def quota() -> None:
    """Limit what projects send in a day and a month.

    Days and months are in UTC, and events count when they arrive.
    """


@quota.command(name="set")
@_project_option
@click.option("--daily", type=_Events(), default=_UNCHANGED, help="Events a day, or off.")
@click.option("--monthly", type=_Events(), default=_UNCHANGED, help="Events a month, or off.")
@with_settings
def set_(settings: Settings, project: str, daily: int | None, monthly: int | None) -> None:
    """Set how many events a project may send.

    What is not given stays as it is; with both off, the project has no quota any more. The service
    applies it within 30 seconds, and counts from then on.
    """
    limits = {"daily": daily, "monthly": monthly}
    given = {period: events for period, events in limits.items() if events != _UNCHANGED}
    if not given:
        raise click.UsageError("give --daily, --monthly or both")
    with opened_tables(settings) as connection:
        before = find_quota(connection, project) or Quota()
        set_quota(connection, project, before._replace(**given))


@quota.command(name="list")
@json_option
@with_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List all quotas, and what is used of them now.

    What a worker has taken in advance counts as used.
    """
    with opened_tables(settings) as connection:
        standings = list_standings(connection)
    if as_json:
        print_json({"project_id": project, **_describe(each)} for project, each in standings)
        return
    click.echo(f"{'PROJECT':20}  {'PERIOD':7}  {'QUOTA':>16}  {'USED':>16}  {'':4}  ENDS")
    for project, each in standings:
        click.echo(f"{make_printable(project):20}  {_format(each)}")


@quota.command()
@_project_option
@json_option
@with_settings
def show(settings: Settings, project: str, as_json: bool) -> None:
    """Show the quota of a project, and its use in each period.

    Only what came while it had a quota was counted.
    """
    with opened_tables(settings) as connection:
        standings, uses = list_standings(connection, project), list_uses(connection, project)
    if not standings:
        raise Failure(f"{make_printable(project)} has no quota")
    for _, standing in standings:
        own = [use for use in uses if use.period == standing.period]
        if as_json:
            days = [{"began": use.began, "used": use.used} for use in own]
            print_json([{**_describe(standing), "uses": days}])
            continue
        click.echo(_format(standing))
        for use in own:
            click.echo(f"{use.began!s:>25}  {use.used:>16}")


def _describe(standing: Standing) -> dict[str, object]:
    return {
        "period": standing.period,
        "quota": standing.events,
        "used": standing.used,
        "left": standing.left,
        "ends_at": _end_of(standing),
    }


def _format(standing: Standing) -> str:
    share = f"{standing.used / standing.events:.0%}"
    figures = f"{standing.events:>16}  {standing.used:>16}  {share:>4}"
    return f"{standing.period:7}  {figures}  {format_moment(_end_of(standing))}"


def _end_of(standing: Standing) -> datetime:
    began = datetime(*standing.began.timetuple()[:3], tzinfo=UTC)
    return began + timedelta(seconds=standing.seconds)
