"""The monthly partitions of the events table, made ahead of their time.

PostgreSQL attaches no partition while the default one has rows of its range, and reads the default
one to be sure, under a lock that ingestion waits for. A row may never be outside of the table while
it moves: a retry of its event would be stored beside it. So a month is made in one transaction, if
that has little to read and to move; by a constraint that makes the reading unnecessary, if there is
much to read and nothing to move; or else never: its events stay in the default partition.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime

from sqlalchemy import Connection, text

from server.errors import Unavailable
from server.storage.citus import bound_locks, can_change_tables, is_distributed
from server.storage.connection import Engine, GuardedConnection, connected
from server.storage.database_thread import DatabaseThread
from server.storage.errors import (
    AWAITED_MONTH,
    Conflict,
    DatabaseError,
    Fault,
    RowLocked,
    translated_errors,
)

MONTHS_AHEAD = 2
_DAY_SECONDS = 86_400.0
_COUNT_SECONDS = 15.0
_QUERY_SECONDS = 5.0
# Of a command.
_TRIES, _TRY_SECONDS = 60, 1.0
_SHORTEST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 5.0, 300.0
# Reading a large default partition takes minutes, and nobody waits for it.
_ROUND_SECONDS = 1800.0
# What is moved, and what is read, under the lock: each takes about a tenth of a second.
_MOST_ROWS = 2000
_MOST_BYTES = 128 << 20

_log = logging.getLogger("productgraph.partitions")

_FIND_PARTITION = text("""
SELECT 1 FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
 WHERE inhparent = 'events'::regclass AND relname = :name
""")
_CAN_ADD = text("""
SELECT bool_and(pg_has_role(relowner, 'USAGE'))
       AND has_schema_privilege(min(relnamespace), 'CREATE') FROM pg_class
 WHERE oid IN ('events'::regclass, 'events_default'::regclass)
""")
_FIND_CONSTRAINT = text("""
SELECT 1 FROM pg_constraint WHERE conrelid = 'events_default'::regclass AND conname = :name
""")
_MEASURE_DEFAULT = text("SELECT pg_relation_size('events_default')")
_MEASURE_DISTRIBUTED_DEFAULT = text("SELECT citus_relation_size('events_default')")
_COUNT_ROWS = """
SELECT count(*) FROM (
    SELECT 1 FROM events_default
     WHERE event_timestamp >= '{start}' AND event_timestamp < '{end}' LIMIT {limit}
) AS found
"""
# As PostgreSQL's statistics have it, about a second late: counting the rows would read them all.
_ESTIMATE_DEFAULT = text("""
SELECT n_live_tup FROM pg_stat_all_tables WHERE relid = 'events_default'::regclass
""")
_ESTIMATE_DISTRIBUTED_DEFAULT = text("""
SELECT CASE WHEN bool_and(success)
            THEN sum(CASE WHEN success THEN CAST(result AS bigint) END) END
  FROM run_command_on_shards('events_default', $$
    SELECT n_live_tup FROM pg_stat_all_tables WHERE relid = '%s'::regclass $$)
""")
# Ingestion takes its lock on the parent before that on a partition; here the parent's is of a kind
# that ingestion does not wait for, so the two cannot deadlock. A long reader makes this fail by its
# lock timeout rather than stop ingestion behind it.
_BEGIN = """
SET LOCAL lock_timeout = '200ms';
SELECT pg_advisory_xact_lock('events'::regclass::oid::bigint);
"""
_LOCK = "LOCK TABLE events_default IN ACCESS EXCLUSIVE MODE"
# One statement for each call, which is all that some poolers and extensions take.
_CREATE = "CREATE TABLE {name} (LIKE events INCLUDING ALL)"
# While it is empty: rows that it had would be copied.
_DISTRIBUTE = """
SELECT create_distributed_table('{name}', 'project_id', colocate_with => 'events')
"""
_MOVE = """
WITH moved AS (
    DELETE FROM events_default
     WHERE event_timestamp >= '{start}' AND event_timestamp < '{end}' RETURNING *
) INSERT INTO {name} SELECT * FROM moved
"""
_ATTACH = "ALTER TABLE events ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')"
# From when it is added, rows of the month are refused; validating it waits for nobody.
_AWAIT = """
ALTER TABLE events_default ADD CONSTRAINT {constraint}
 CHECK (event_timestamp < '{start}' OR event_timestamp >= '{end}') NOT VALID
"""
_VALIDATE = "ALTER TABLE events_default VALIDATE CONSTRAINT {constraint}"
_FORGET = "ALTER TABLE events_default DROP CONSTRAINT IF EXISTS {constraint}"


def months_from(day: date, count: int) -> Iterator[tuple[date, date]]:
    """Yield the first days of `count` months from that of `day` on, each with the next one."""
    first = day.year * 12 + day.month - 1
    for number in range(first, first + count):
        yield _first_day(number), _first_day(number + 1)


def _first_day(number: int) -> date:
    return date(number // 12, number % 12 + 1, 1)


@dataclass(frozen=True)
class _Month:
    """A month that has no partition yet."""

    connection: Connection
    first_day: date
    next_first_day: date

    @property
    def name(self) -> str:
        return f"events_{self.first_day:%Y_%m}"

    @property
    def constraint(self) -> str:
        return f"{AWAITED_MONTH}{self.name}"

    def execute(self, statement: str) -> int:
        """Run a statement about this month; return its first value, if it has one."""
        filled = statement.format(
            name=self.name,
            constraint=self.constraint,
            start=f"{self.first_day} 00:00+00",
            end=f"{self.next_first_day} 00:00+00",
            limit=_MOST_ROWS + 1,
        )
        result = self.connection.exec_driver_sql(filled)
        return int(result.scalar() or 0) if result.returns_rows else 0

    def begin_change(self) -> None:
        """Begin a transaction that changes tables."""
        self.execute(_BEGIN)
        bound_locks(self.connection)

    def exists(self) -> bool:
        return self.connection.scalar(_FIND_PARTITION, {"name": self.name}) is not None

    def is_awaited(self) -> bool:
        """Whether the default partition has the constraint already."""
        return self.connection.scalar(_FIND_CONSTRAINT, {"name": self.constraint}) is not None


def add_months(connection: Connection, today: date) -> None:
    """Add the partitions of this month and the next ones that are missing.

    Raises Conflict if a lock cannot be had in time: the months done so far stay.
    """
    with translated_errors():
        for start, end in months_from(today, MONTHS_AHEAD + 1):
            _add_month(_Month(connection, start, end))


def _find_missing(connection: Connection, today: date) -> list[str]:
    months = (_Month(connection, *days) for days in months_from(today, MONTHS_AHEAD + 1))
    return [month.name for month in months if not month.exists()]


def _add_month(month: _Month) -> None:
    with month.connection.begin():
        if month.exists():
            return
        rows = month.execute(_COUNT_ROWS)
        is_small = _is_small(month.connection)
    if rows > _MOST_ROWS:
        added = False
    elif is_small:
        added = _move(month)
    else:
        added = rows == 0 and _await(month)
    if added:
        _log.info("partition added", extra={"partition": month.name})
    else:
        extra = {"partition": month.name, "rows_at_least": rows}
        _log.warning("a month stays in the default partition, which has too much", extra=extra)


def _is_small(connection: Connection) -> bool:
    measure = _MEASURE_DISTRIBUTED_DEFAULT if is_distributed(connection) else _MEASURE_DEFAULT
    return int(connection.scalar(measure) or 0) <= _MOST_BYTES


def _move(month: _Month) -> bool:
    """Make the partition, with the rows that wait for it; return False if they are too many."""
    with month.connection.begin() as transaction:
        month.begin_change()
        if month.exists():  # somebody else has added it meanwhile
            return True
        month.execute(_LOCK)
        # Both were small a moment ago, and may be filled at thousands of rows a second.
        if not _is_small(month.connection) or month.execute(_COUNT_ROWS) > _MOST_ROWS:
            transaction.rollback()
            return False
        for statement in (*_list_creation(month.connection), _MOVE, _ATTACH, _FORGET):
            month.execute(statement)
    return True


def _await(month: _Month) -> bool:
    """Make the partition of a month that has no rows; return False if one comes before that."""
    with month.connection.begin():
        month.begin_change()
        if not (month.exists() or month.is_awaited()):
            month.execute(_AWAIT)
    try:
        with translated_errors(), month.connection.begin():
            month.execute(_VALIDATE)
    except RowLocked:  # the rows of this month, were there any
        with month.connection.begin():
            month.begin_change()
            month.execute(_FORGET)
        return False
    with month.connection.begin():
        month.begin_change()
        if not month.exists():
            for statement in (*_list_creation(month.connection), _ATTACH):
                month.execute(statement)
        month.execute(_FORGET)
    return True


def _list_creation(connection: Connection) -> Sequence[str]:
    return (_CREATE, _DISTRIBUTE) if is_distributed(connection) else (_CREATE,)


def add_months_patiently(engine: Engine, today: date) -> None:
    """Add the missing partitions for a command. Raises DatabaseError if the tables are in use."""
    for _ in range(_TRIES):
        try:
            with connected(engine) as connection:
                return add_months(connection, today)
        except Conflict:
            time.sleep(_TRY_SECONDS)
    raise DatabaseError("the partitions could not be added, for the tables are in use: try again")


class PartitionKeeper(DatabaseThread):
    """Adds partitions when the service starts, and every day; `on_failure` counts its failures.

    It also knows how many events are in the default partition, for whoever watches that.
    """

    STOP_SECONDS = 5.0

    def __init__(
        self,
        connection: GuardedConnection,
        today: Callable[[], date] = lambda: datetime.now(UTC).date(),
        on_failure: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("partitions", connection)
        self._today = today
        self._on_failure = on_failure
        self._clock = clock
        self._failures = 0
        self._due_at = clock()
        self._default_rows: int | None = None

    def default_rows(self) -> int | None:
        """Return about how many events the default partition has; None if that is not known."""
        return self._default_rows

    def _run_round(self) -> float:
        if self._clock() >= self._due_at:
            self._due_at = self._clock() + self._add_months()
        self._default_rows = self._estimate_rows()
        return max(0.0, min(_COUNT_SECONDS, self._due_at - self._clock()))

    def _note_cut(self) -> None:
        self._default_rows = None

    def _estimate_rows(self) -> int | None:
        # Whatever is wrong with the database is seen by those who need it.
        with (
            suppress(Conflict, Unavailable, Fault),
            self._connection.connected(_QUERY_SECONDS) as c,
        ):
            if not is_distributed(c):
                return int(c.scalar(_ESTIMATE_DEFAULT) or 0)
            rows = c.scalar(_ESTIMATE_DISTRIBUTED_DEFAULT)
            return None if rows is None else int(rows)
        return None

    def _add_months(self) -> float:
        """Add what is missing; return for how many seconds that is good."""
        try:
            with self._connection.connected(_ROUND_SECONDS) as connection:
                missing = self._add_or_find_missing(connection)
        except (Conflict, Unavailable) as error:
            level = logging.WARNING if isinstance(error, Conflict) else logging.DEBUG
            _log.log(level, "partitions could not be added, trying again", exc_info=error.__cause__)
        except Exception:  # noqa: BLE001 - whatever it was may be over the next time
            _log.exception("partitions could not be added, trying again")
        else:
            if not missing:
                self._failures = 0
                return _DAY_SECONDS
            extra = {"partitions": missing}
            _log.warning("partitions are missing, and only `migrate` may add them", extra=extra)
        return self._note_failure()

    def _add_or_find_missing(self, connection: Connection) -> list[str]:
        """Add partitions, or return those that are missing if they must not be added here."""
        if connection.scalar(_CAN_ADD) and can_change_tables(connection):
            connection.commit()
            add_months(connection, self._today())
            return []
        return _find_missing(connection, self._today())

    def _note_failure(self) -> float:
        if self._on_failure is not None:
            self._on_failure()
        self._failures += 1
        pause = _SHORTEST_RETRY_SECONDS * 2.0 ** min(self._failures - 1, 16)
        return min(_LONGEST_RETRY_SECONDS, pause)
