"""Rows like those that the service stores, generated in the database until a limit is reached."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

from server.storage.connection import connected, open_engine
from server.storage.partitions import add_months, months_from
from tests.bench.database import BenchDatabase
from tests.bench.events import Tenant

_SPAN = timedelta(days=365)
_MONTHS = 12
# Of one statement, whose rows go over all months.
_SLICE_ROWS = 250_000
_TEMPLATES = 1000
_CREATE_TEMPLATES = f"""
CREATE TABLE bench_templates AS
SELECT *, row_number() OVER () - 1 AS template FROM (SELECT * FROM events LIMIT {_TEMPLATES}) e
"""
_LIST_COLUMNS = """
SELECT attname FROM pg_attribute
 WHERE attrelid = 'events'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_MEASURE = """
SELECT sum(pg_total_relation_size(relid))::bigint FROM pg_partition_tree('events')
"""
_NEW = {
    "event_id": "'evt_' || lpad(to_hex(n), 8, '0') || substr(event_id, 13)",
    "project_id": "(%(projects)s::text[])[n %% %(count)s + 1]",
    "event_timestamp": "%(start)s + (n - %(first)s) * %(step)s::interval",
    "received_at": "%(start)s + (n - %(first)s) * %(step)s::interval",
}


@dataclass(frozen=True)
class Limits:
    """When a table is full; `rows` is None if there is no such limit."""

    rows: int | None
    size: int
    seconds: float

    def find_end(self, rows: int, size: int, seconds: float, slice_size: int) -> str | None:
        """Return why there is no next slice, or None if there is one."""
        if self.rows is not None and rows >= self.rows:
            return f"it has the {self.rows:,} rows that were asked for"
        if size + slice_size > self.size:
            return f"another slice would exceed half of the free disk, {self.size / 2**30:.1f} GiB"
        if seconds >= self.seconds:
            return f"the {self.seconds / 60:g} minutes were over"
        return None


@dataclass(frozen=True)
class Filled:
    """How many rows were generated, and why no more; the table has those of loads, too."""

    rows: int
    table_rows: int
    table_bytes: int
    end: str


class Filling:
    """Fills a table that has the partitions of a year with events that look like the service's."""

    def __init__(
        self,
        database: BenchDatabase,
        tenants: Sequence[Tenant],
        now: datetime,
        on_step: Callable[[str], None],
    ) -> None:
        self._database = database
        self._projects = [project for project, _ in tenants]
        self._now = now
        self._on_step = on_step
        self._rows = 0
        self._seconds = 0.0
        # As the service would have made them, had it run in each of these months.
        with connected(open_engine(database.url)) as connection:
            for month, _ in months_from((now - _SPAN).date(), _MONTHS):
                add_months(connection, month)

    @cached_property
    def _insert(self) -> str:
        """Return the statement that copies events which the service has stored."""
        self._database.execute(_CREATE_TEMPLATES)
        columns = [name for (name,) in self._database.query(_LIST_COLUMNS)]
        values = ", ".join(_NEW.get(column, column) for column in columns)
        return (
            f"INSERT INTO events ({', '.join(columns)}) SELECT {values}"
            " FROM generate_series(%(first)s, %(last)s) AS n"
            " JOIN bench_templates ON template = n %% (SELECT count(*) FROM bench_templates)"
        )

    def fill(self, limits: Limits) -> Filled:
        """Add rows up to the first of these limits, and leave nothing of them to be done later."""
        size, slice_size = self._measure(), 0
        while (end := limits.find_end(self._rows, size, self._seconds, slice_size)) is None:
            before, began = size, time.monotonic()
            rest = _SLICE_ROWS if limits.rows is None else limits.rows - self._rows
            self._insert_slice(min(_SLICE_ROWS, rest))
            size = self._measure()
            self._seconds += time.monotonic() - began
            slice_size = size - before
            self._on_step(f"table: {self._rows:,} rows, {size / 2**30:.1f} GiB")
        self._on_step(f"table: VACUUM of {self._rows:,} rows")
        self._database.execute("VACUUM ANALYZE events")
        self._database.execute("CHECKPOINT")
        return Filled(self._rows, self._database.count_events(), self._measure(), end)

    def _measure(self) -> int:
        [(size,)] = self._database.query(_MEASURE)
        return int(size)

    def _insert_slice(self, count: int) -> None:
        """Insert this many rows, in the order of their times."""
        self._database.execute(
            self._insert,
            first=self._rows + 1,
            last=self._rows + count,
            projects=self._projects,
            count=len(self._projects),
            start=self._now - _SPAN,
            step=_SPAN / count,
        )
        self._rows += count
