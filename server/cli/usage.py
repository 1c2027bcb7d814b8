"""`productgraph usage`: what each project uses."""

from datetime import UTC, datetime

import click

from server.cli.command import json_option, with_settings
from server.cli.events import (
    Groups,
    Moment,
    latest,
    opened_queries,
    print_counts,
    project_option,
    timeout_option,
    until_option,
)
from server.config import Settings
from server.storage.event_queries import EventFilter


@click.command()
@click.option(
    "--since",
    type=Moment(),
    default="30d",
    show_default=True,
    help="The first day, counted whole: a time or an age.",
)
@until_option
@click.option(
    "--by",
    type=Groups(),
    default="project,day",
    show_default=True,
    help="What to group by.",
)
@project_option
@timeout_option
@json_option
@with_settings
def usage(
    settings: Settings,
    since: datetime,
    until: datetime | None,
    by: list[str],
    project: str | None,
    timeout: int,
    as_json: bool,
) -> None:
    """Show how many events each project has stored.

    Events count on the UTC day of their own time (event.timestamp), whenever they arrived. The
    primary key answers this; by type, the rows have to be read, which takes longer.
    """
    first_day = since.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    with opened_queries(settings, timeout) as queries:
        counts = queries.count(by, EventFilter(project), first_day, until or latest())
    print_counts(by, counts, as_json=as_json)
