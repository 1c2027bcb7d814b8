"""`productgraph retention`: deletes events that have been kept long enough."""

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

import click

from server.cli.command import Failure, opened_engine, with_settings
from server.config import Settings
from server.storage.citus import check_coordinator
from server.storage.connection import Connection, connected
from server.storage.dead_events import count_old_dead, delete_old_dead
from server.storage.errors import Conflict
from server.storage.rejected_events import count_expired, delete_expired
from server.storage.retention import (
    Partition,
    count_expired_rows,
    delete_expired_rows,
    drop_partition,
    list_expired_partitions,
)

_PAUSE_SECONDS = 1.0


class _Days(click.ParamType[timedelta]):
    name = "days"

    def convert(
        self, value: str, parameter: click.Parameter | None, context: click.Context | None
    ) -> timedelta:
        # No other unit: 3m would be three minutes to one and three months to another.
        if not re.fullmatch(r"[1-9][0-9]{0,4}d", value, re.ASCII):
            self.fail(f"must be a number of days such as 90d, is {value!r}", parameter, context)
        return timedelta(days=int(value[:-1]))


@click.command()
@click.option("--keep", type=_Days(), required=True, help="How long to keep, such as 90d.")
@click.option(
    "--tries",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="How often to ask for a lock, once a second.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would go (the default).")
@click.option("--yes", is_flag=True, help="Delete it.")
@with_settings
def retention(settings: Settings, keep: timedelta, tries: int, dry_run: bool, yes: bool) -> None:
    """Delete old events.

    Whole months are dropped once they lie entirely before the time to keep, single rows only from
    the default partition; rejected and dead events go by the time at which they came. Without --yes
    it only shows what would go. Safe to run beside the service, which goes on meanwhile.
    """
    if dry_run and yes:
        raise click.UsageError("give --dry-run or --yes, not both")
    cut = datetime.now(UTC) - keep
    with opened_engine(settings) as engine, connected(engine) as connection:
        with connection.begin():
            check_coordinator(connection)
            partitions = list_expired_partitions(connection, cut)
        if yes:
            _delete(connection, partitions, cut, tries)
            return
        with connection.begin():
            _show(connection, partitions, cut)


def _show(connection: Connection, partitions: Sequence[Partition], cut: datetime) -> None:
    click.echo(f"With --yes, of what came before {cut:%Y-%m-%d %H:%M} UTC would go:")
    for partition in partitions:
        click.echo(f"  the partition {_describe(partition)}")
    click.echo(f"  {count_expired_rows(connection, cut)} rows of events_default")
    click.echo(f"  {count_expired(connection, cut)} rejected events")
    click.echo(f"  {count_old_dead(connection, cut)} dead events")


def _describe(partition: Partition) -> str:
    rows = "of unknown rows" if partition.rows is None else f"of about {partition.rows} rows"
    return f"{partition.name}, {rows} and {partition.size / 2**20:.1f} MB"


def _delete(
    connection: Connection, partitions: Sequence[Partition], cut: datetime, tries: int
) -> None:
    for partition in partitions:
        if not _drop_patiently(connection, partition, tries):
            raise Failure(
                f"{partition.name} could not be locked in {tries} tries, because some query on the"
                " events has been running all the time; run this again later"
            )
        click.echo(f"dropped the partition {_describe(partition)}")
    click.echo(f"deleted {sum(delete_expired_rows(connection, cut))} rows of events_default")
    for name, delete in (("rejected", delete_expired), ("dead", delete_old_dead)):
        # A round that deletes nothing has found no more.
        click.echo(f"deleted {sum(iter(partial(delete, connection, cut), 0))} {name} events")


def _drop_patiently(connection: Connection, partition: Partition, tries: int) -> bool:
    for attempt in range(tries):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        with suppress(Conflict):
            drop_partition(connection, partition)
            return True
    return False
