"""The monthly partitions of the events table, made ahead of their time."""

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime

from sqlalchemy import Connection, text

from server.errors import Unavailable
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict

MONTHS_AHEAD = 2
_DAY_SECONDS = 86_400.0
_RETRY_SECONDS = 5.0
_ROUND_SECONDS = 60.0

_log = logging.getLogger("productgraph.partitions")

_FIND_PARTITION = text("""
SELECT 1 FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
 WHERE inhparent = 'events'::regclass AND relname = :name
""")
# Ingestion takes its lock on the parent before that on a partition; here the parent's is of a kind
# that ingestion does not wait for, so the two cannot deadlock. A long reader makes this fail by its
# lock timeout rather than stop ingestion behind it.
_BEGIN = """
SET LOCAL lock_timeout = '1s';
SELECT pg_advisory_xact_lock('events'::regclass::oid::bigint);
"""
_ADD_MONTH = """
LOCK TABLE events_default IN ACCESS EXCLUSIVE MODE;
CREATE TABLE {name} (LIKE events INCLUDING ALL);
WITH moved AS (
    DELETE FROM events_default
     WHERE event_timestamp >= '{start}' AND event_timestamp < '{end}' RETURNING *
) INSERT INTO {name} SELECT * FROM moved;
ALTER TABLE events ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}');
"""


def months_from(day: date, count: int) -> Iterator[tuple[date, date]]:
    """Yield the first days of `count` months from that of `day` on, each with the next one."""
    first = day.year * 12 + day.month - 1
    for number in range(first, first + count):
        yield _first_day(number), _first_day(number + 1)


def _first_day(number: int) -> date:
    return date(number // 12, number % 12 + 1, 1)


def add_months(connection: Connection, today: date) -> None:
    """Add the partitions of this month and the next ones that are missing.

    Rows of such a month that wait in the default partition move over in the same transaction.
    Raises Conflict where a lock could not be had in time: the months done so far stay.
    """
    for start, end in months_from(today, MONTHS_AHEAD + 1):
        with connection.begin():
            _add_month(connection, f"events_{start:%Y_%m}", start, end)


def _exists(connection: Connection, name: str) -> bool:
    return connection.scalar(_FIND_PARTITION, {"name": name}) is not None


def _add_month(connection: Connection, name: str, start: date, end: date) -> None:
    if _exists(connection, name):
        return
    connection.exec_driver_sql(_BEGIN)
    if not _exists(connection, name):  # nobody else has added it meanwhile
        bounds = {"start": f"{start} 00:00+00", "end": f"{end} 00:00+00"}
        connection.exec_driver_sql(_ADD_MONTH.format(name=name, **bounds))
        _log.info("partition added", extra={"partition": name})


class PartitionKeeper(DatabaseThread):
    """Adds partitions when the service starts, and every day."""

    STOP_SECONDS = _ROUND_SECONDS

    def __init__(
        self,
        connection: GuardedConnection,
        today: Callable[[], date] = lambda: datetime.now(UTC).date(),
    ) -> None:
        super().__init__("partitions", connection)
        self._today = today

    def _run_round(self) -> float:
        try:
            with self._connection.connected(_ROUND_SECONDS) as connection:
                add_months(connection, self._today())
        except (Conflict, Unavailable):
            _log.warning("partitions could not be added, trying again")
            return _RETRY_SECONDS
        return _DAY_SECONDS
