"""`productgraph retention`: deletes events that are older than they are to be kept."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

from server.cli.command import Commands, add_command, opened_engine
from server.config import Settings
from server.storage.connection import Conflict, Connection, connected, transactional
from server.storage.dead_events import count_old_dead, delete_old_dead
from server.storage.rejected_events import count_expired, delete_expired
from server.storage.retention import (
    Partition,
    count_expired_rows,
    delete_expired_rows,
    drop_partition,
    list_expired_partitions,
)

_PAUSE_SECONDS = 1.0


def add_retention_command(commands: Commands) -> None:
    """Adds the command."""
    retention = add_command(
        commands,
        "retention",
        _run,
        "Deletes old events: whole months are dropped once they lie entirely before the time to"
        " keep, single rows only from the default partition; rejected and dead events go by the"
        " time at which they came. Without --yes it only shows what would go. Safe to run beside"
        " the service, which goes on meanwhile.",
    )
    retention.add_argument(
        "--keep", type=_parse_days, required=True, metavar="DAYS", help="such as 90d"
    )
    retention.add_argument(
        "--tries", type=int, default=10, help="how often a lock is asked for, once a second (10)"
    )
    how = retention.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only show what would go (the default)")
    how.add_argument("--yes", action="store_true", help="delete it")


def _parse_days(text: str) -> timedelta:
    # No other unit: 3m would be three minutes to one and three months to another.
    if not re.fullmatch(r"[1-9][0-9]{0,4}d", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be a number of days such as 90d, is {text!r}")
    return timedelta(days=int(text[:-1]))


def _run(settings: Settings, options: argparse.Namespace) -> int:
    cut = datetime.now(UTC) - options.keep
    with opened_engine(settings) as engine, connected(transactional(engine)) as connection:
        with connection.begin():
            partitions = list_expired_partitions(connection, cut)
        if options.yes:
            return _delete(connection, partitions, cut, options.tries)
        with connection.begin():
            _show(connection, partitions, cut)
    return 0


def _show(connection: Connection, partitions: Sequence[Partition], cut: datetime) -> None:
    print(f"With --yes, of what came before {cut:%Y-%m-%d %H:%M} UTC would go:")
    for partition in partitions:
        print(f"  the partition {_describe(partition)}")
    print(f"  {count_expired_rows(connection, cut)} rows of events_default")
    print(f"  {count_expired(connection, cut)} rejected events")
    print(f"  {count_old_dead(connection, cut)} dead events")


def _describe(partition: Partition) -> str:
    rows = "of unknown rows" if partition.rows is None else f"of about {partition.rows} rows"
    return f"{partition.name}, {rows} and {partition.size / 2**20:.1f} MB"


def _delete(
    connection: Connection, partitions: Sequence[Partition], cut: datetime, tries: int
) -> int:
    for partition in partitions:
        if not _drop_patiently(connection, partition, tries):
            print(
                f"productgraph: {partition.name} could not be locked in {tries} tries, some query"
                " on the events has been running all the time; run this again later",
                file=sys.stderr,
            )
            return 1
        print(f"dropped the partition {_describe(partition)}")
    print(f"deleted {sum(delete_expired_rows(connection, cut))} rows of events_default")
    for name, delete in (("rejected", delete_expired), ("dead", delete_old_dead)):
        # A round that deletes nothing has found no more.
        print(f"deleted {sum(iter(partial(delete, connection, cut), 0))} {name} events")
    return 0


def _drop_patiently(connection: Connection, partition: Partition, tries: int) -> bool:
    for attempt in range(tries):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        with suppress(Conflict):
            drop_partition(connection, partition)
            return True
    return False
