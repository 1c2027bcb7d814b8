"""Questions about stored events: the newest, one by its id, counts, and all of a period.

The primary key (project, time, id) answers for an event's own time, the index on `received_at` for
its arrival. A query that takes too long is ended, so that no question can slow ingestion down for
long.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any

import orjson
from psycopg2.errors import QueryCanceled
from sqlalchemy import Connection, RowMapping, TextClause, text
from sqlalchemy.exc import DBAPIError

from server.events.schema import EVENT_SCHEMA, Kind
from server.storage.citus import is_distributed
from server.storage.errors import DatabaseError, tolerated_drop

QUERY_SECONDS = 60
_PAGE_ROWS = 5000
# The newest events are looked for in this much time, then in a multiple of it before that, …
_FIRST_WINDOW = timedelta(seconds=1)
_GROWTH = 3
# Rows are appended: the newest are in the last pages of a partition, unless it has had gaps.
_LAST_PAGES = 16

_OBJECTS = frozenset(field.name for field in EVENT_SCHEMA.of_kind(Kind.OBJECT))
_WIRE_NAMES = {field.name: field.wire_name for field in EVENT_SCHEMA.fields}
COLUMNS = ", ".join(
    [f"{name}::text" if name in _OBJECTS else name for name in _WIRE_NAMES] + ["received_at"]
)
# Enough of an event for a list, however large it is: no objects, and no text beyond the length of
# the ids, which are whole.
_BRIEF_CHARACTERS = 255
_TEXTS = frozenset(field.name for field in EVENT_SCHEMA.of_kind(Kind.TEXT))
_BRIEF_COLUMNS = ", ".join(
    f"left({name}, {_BRIEF_CHARACTERS}) AS {name}" if name in _TEXTS else name
    for name in (*_WIRE_NAMES, "received_at")
    if name not in _OBJECTS
)
_MATCHES = """
       (CAST(:project AS text) IS NULL OR project_id = :project)
   AND (CAST(:type AS text) IS NULL OR event_type = :type)
   AND (CAST(:session AS text) IS NULL OR session_id = :session)
   AND (CAST(:user AS text) IS NULL OR user_id = :user)
"""
# What Citus adds to the name of a partition.
_SHARD = re.compile(r"(?<=[a-z0-9]{2})_[0-9]{6,}$")
_ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
_SET_TIMEOUT = text("SELECT set_config('statement_timeout', :milliseconds, true)")
_NOW = text("SELECT now()")
_LIST_PARTITIONS = text("""
SELECT inhrelid::regclass::text AS name,
       pg_relation_size(inhrelid) / current_setting('block_size')::bigint AS pages
  FROM pg_inherits WHERE inhparent = 'events'::regclass
""")
_FIND_ARRIVED = """
SELECT {columns} FROM events WHERE {matches}
   AND received_at > :after AND received_at <= :until
 ORDER BY received_at DESC, event_timestamp DESC, event_id DESC LIMIT :limit
"""
_FIND_ARRIVED_WHOLE = text(_FIND_ARRIVED.format(columns=COLUMNS, matches=_MATCHES))
_FIND_ARRIVED_BRIEF = text(_FIND_ARRIVED.format(columns=_BRIEF_COLUMNS, matches=_MATCHES))
# Every project has had a key, and by the projects' names the primary key finds an id.
_PROJECTS = """
ANY (ARRAY(SELECT DISTINCT project_id FROM api_keys
            WHERE CAST(:project AS text) IS NULL OR project_id = :project))
"""
_FIND_BY_ID = text(f"""
SELECT {COLUMNS}, tableoid::regclass::text AS partition FROM events
 WHERE project_id = {_PROJECTS} AND event_timestamp >= :since AND event_id = :event_id
 ORDER BY event_timestamp LIMIT :limit
""")  # noqa: S608 - the columns are the schema's, as below
_FIND_BY_KEY = text(f"""
SELECT {COLUMNS}, tableoid::regclass::text AS partition FROM events
 WHERE project_id = :project AND event_timestamp = :timestamp AND event_id = :event_id
""")  # noqa: S608
# For each project the first entry of the primary key.
_FIND_OLDEST = text("""
SELECT min(first.event_timestamp) AS oldest FROM (
    SELECT DISTINCT project_id FROM api_keys
     WHERE CAST(:project AS text) IS NULL OR project_id = :project
) AS known CROSS JOIN LATERAL (
    SELECT event_timestamp FROM events WHERE events.project_id = known.project_id COLLATE "C"
     ORDER BY event_timestamp LIMIT 1
) AS first
""")
# Citus joins no table that it has distributed in that way.
_FIND_OLDEST_OF_PROJECT = text("""
SELECT event_timestamp AS oldest FROM events WHERE project_id = :project
 ORDER BY event_timestamp LIMIT 1
""")
_GROUPS = {
    "project": "project_id",
    "type": "event_type",
    "day": "to_char(event_timestamp AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
}
GROUPINGS = tuple(_GROUPS)
_COUNT = """
SELECT {columns}, count(*) AS events FROM events WHERE {matches}
   AND event_timestamp >= :since AND event_timestamp < :until
 GROUP BY {groups} ORDER BY {groups}
"""
# Of what the primary key has, it answers alone; of everything else the rows have to be read.
_KEY_ALONE = text("SET LOCAL enable_seqscan = off")
_ESTIMATE = text(f"""
EXPLAIN (FORMAT JSON) SELECT FROM events WHERE {_MATCHES}
   AND event_timestamp >= :since AND event_timestamp < :until
""")
# Otherwise it is the plan of one shard.
_EXPLAIN_NODES = text("SET LOCAL citus.explain_all_tasks = on")
_LIST_PROJECTS = text("""
SELECT DISTINCT project_id FROM api_keys
 WHERE CAST(:project AS text) IS NULL OR project_id = :project ORDER BY 1
""")
_READ_PAGE = text(f"""
SELECT {COLUMNS} FROM events WHERE {_MATCHES}
   AND (event_timestamp, event_id) > (:after, :after_id) AND event_timestamp < :until
 ORDER BY event_timestamp, event_id LIMIT :limit
""")  # noqa: S608


@dataclass(frozen=True)
class EventFilter:
    """Which events are asked for; None means any."""

    project: str | None = None
    type: str | None = None
    session: str | None = None
    user: str | None = None

    @property
    def values(self) -> dict[str, str | None]:
        """The values for a query."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class StoredEvent:
    """A row of the events table.

    `fields` has the event by its names on the wire, as it could be sent in again over HTTP.
    """

    fields: dict[str, Any]
    timestamp: datetime
    received_at: datetime
    partition: str | None = None

    @property
    def key(self) -> tuple[str, datetime, str]:
        """What tells it from any other event."""
        return self.fields["project_id"], self.timestamp, self.fields["event_id"]


class EventQueries:
    """Questions to one database, each ended after `seconds`. All raise DatabaseError.

    With `brief`, lists of the newest events have no objects, and only the beginning of long texts.
    """

    def __init__(
        self, connection: Connection, seconds: float = QUERY_SECONDS, *, brief: bool = False
    ) -> None:
        self._connection = connection
        self._seconds = seconds
        self._find_arrived = _FIND_ARRIVED_BRIEF if brief else _FIND_ARRIVED_WHOLE

    def read_now(self) -> datetime:
        """Return the database's time."""
        now = self._query(_NOW)[0]["now"]
        assert isinstance(now, datetime)
        return now

    def find_newest(
        self, wanted: EventFilter, until: datetime, since: datetime, limit: int
    ) -> list[StoredEvent]:
        """Return the events that arrived last between `since` and `until`, the newest first."""
        found: list[StoredEvent] = []
        for events, _ in self.look_back(wanted, until, since, limit):
            found += events
        return found

    def look_back(
        self, wanted: EventFilter, until: datetime, since: datetime, limit: int
    ) -> Iterator[tuple[list[StoredEvent], datetime]]:
        """Yield the newest events, bit by bit, and each time since when all arrivals were seen.

        Looks at windows of time that grow, each in a query of its own. The first one reaches back
        to about the newest arrival, however long ago that was.
        """
        window = _FIRST_WINDOW
        newest = self._estimate_newest_arrival() or until
        after = min(until, newest) - window
        while until > since and limit > 0:
            after = max(since, after)
            found = self.find_arrived(wanted, after, until, limit)
            yield found, after
            limit -= len(found)
            window *= _GROWTH
            until, after = after, after - window

    def _estimate_newest_arrival(self) -> datetime | None:
        """Return the newest arrival in the last pages of partitions; there may be newer ones."""
        if self._is_distributed():
            return None  # its nodes would read all of their rows for that
        parts = [
            f"SELECT max(received_at) AS moment FROM {row['name']}"  # noqa: S608 - quoted by regclass
            f" WHERE ctid >= '({max(0, row['pages'] - _LAST_PAGES)},0)'"
            for row in self._query(_LIST_PARTITIONS)
            if row["pages"] is not None  # else it was dropped meanwhile
        ]
        union = text(f"SELECT max(moment) AS newest FROM ({' UNION ALL '.join(parts)}) AS ends")  # noqa: S608
        with tolerated_drop():
            newest = self._query(union)[0]["newest"]
            assert newest is None or isinstance(newest, datetime)
            return newest
        return None

    def find_arrived(
        self, wanted: EventFilter, after: datetime, until: datetime, limit: int
    ) -> list[StoredEvent]:
        """Return the newest events that arrived after one moment and until another."""
        values = {**wanted.values, "after": after, "until": until, "limit": limit}
        return [make_event(row) for row in self._query(self._find_arrived, values)]

    def find_by_id(
        self, event_id: str, project: str | None, since: datetime, limit: int = 100
    ) -> list[StoredEvent]:
        """Return the events of this id since a time of theirs, the oldest first."""
        values = {"event_id": event_id, "project": project, "since": since, "limit": limit}
        return [make_event(row) for row in self._query(_FIND_BY_ID, values)]

    def find_by_key(self, project: str, timestamp: datetime, event_id: str) -> StoredEvent | None:
        """Return the event with this key, or None if there is none."""
        values = {"project": project, "timestamp": timestamp, "event_id": event_id}
        rows = self._query(_FIND_BY_KEY, values)
        return make_event(rows[0]) if rows else None

    def find_oldest_time(self, project: str | None) -> datetime | None:
        """Return the earliest time of a stored event, or None if there is none."""
        wanted = {"project": project}
        if self._is_distributed():
            projects = self._query(_LIST_PROJECTS, wanted)
            found = [row for each in projects for row in self._find_oldest_of(each["project_id"])]
            return min((row["oldest"] for row in found), default=None)
        oldest = self._query(_FIND_OLDEST, wanted)[0]["oldest"]
        assert oldest is None or isinstance(oldest, datetime)
        return oldest

    def _find_oldest_of(self, project: str) -> Sequence[RowMapping]:
        return self._query(_FIND_OLDEST_OF_PROJECT, {"project": project})

    def count(
        self, by: Sequence[str], wanted: EventFilter, since: datetime, until: datetime
    ) -> list[dict[str, Any]]:
        """Count events by some of GROUPINGS, for a period of their own time.

        Unless it is about their types, sessions or users, the primary key is read and no row.
        """
        groups = ", ".join(str(number) for number in range(1, len(by) + 1))
        columns = ", ".join(f"{_GROUPS[name]} AS {name}" for name in by)
        statement = text(_COUNT.format(columns=columns, groups=groups, matches=_MATCHES))
        values = {**wanted.values, "since": since, "until": until}
        is_in_key = "type" not in by and wanted == EventFilter(wanted.project)
        with self.transaction() as connection:
            if is_in_key:
                connection.execute(_KEY_ALONE)
            return [dict(row) for row in connection.execute(statement, values).mappings()]

    def estimate(self, wanted: EventFilter, since: datetime, until: datetime) -> int:
        """Return about how many events `read` yields, by the database's statistics."""
        values = {**wanted.values, "since": since, "until": until}
        with self.transaction() as connection:
            if distributed := is_distributed(connection):
                connection.execute(_EXPLAIN_NODES)
            [plan] = connection.execute(_ESTIMATE, values).mappings().one()["QUERY PLAN"]
        return sum(_list_estimates(plan["Plan"])) if distributed else plan["Plan"]["Plan Rows"]

    def read(self, wanted: EventFilter, since: datetime, until: datetime) -> Iterator[StoredEvent]:
        """Yield the events of a period of their own time, by project, time and id.

        Reads them page by page, each in a transaction of its own: nothing waits for a reader that
        is slow, and memory stays as it is.
        """
        projects = self._query(_LIST_PROJECTS, {"project": wanted.project})
        for row in projects:
            yield from self._read_project(replace(wanted, project=row["project_id"]), since, until)

    def _read_project(
        self, wanted: EventFilter, since: datetime, until: datetime
    ) -> Iterator[StoredEvent]:
        values: dict[str, object] = {**wanted.values, "until": until}
        after, after_id = since, ""  # no id is empty
        while True:
            values |= {"after": after, "after_id": after_id, "limit": _PAGE_ROWS}
            rows = self._query(_READ_PAGE, values)
            yield from map(make_event, rows)
            if len(rows) < _PAGE_ROWS:
                return
            after, after_id = rows[-1]["event_timestamp"], rows[-1]["event_id"]

    def _is_distributed(self) -> bool:
        with self.transaction() as connection:
            return is_distributed(connection)

    def _query(
        self, statement: TextClause, values: Mapping[str, object] | None = None
    ) -> Sequence[RowMapping]:
        with self.transaction() as connection:
            return connection.execute(statement, values or {}).mappings().all()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Begin a transaction of one snapshot, each query of which is ended in time."""
        timeout = str(int(self._seconds * 1000))
        try:
            with self._connection.begin():
                self._connection.execute(_ONE_SNAPSHOT)
                self._connection.execute(_SET_TIMEOUT, {"milliseconds": timeout})
                yield self._connection
        except DBAPIError as error:
            if not isinstance(error.orig, QueryCanceled):
                raise
            raise DatabaseError(
                f"no answer within {self._seconds:.0f} s: ask for one project or for less time, or"
                " give a longer --timeout"
            ) from error


def _list_estimates(plan: Mapping[str, Any]) -> Iterator[int]:
    """Yield how many rows each shard is expected to have, by Citus's plan of a whole query."""
    for task in plan["Distributed Query"]["Job"]["Tasks"]:
        for [remote] in task["Remote Plan"]:
            yield remote["Plan"]["Plan Rows"]


def make_event(row: RowMapping) -> StoredEvent:
    """Return the event of a row that has COLUMNS, and perhaps the name of its partition."""
    present = {
        wire_name: orjson.Fragment(row[name]) if name in _OBJECTS else row[name]
        for name, wire_name in _WIRE_NAMES.items()
        if row.get(name) is not None
    }
    partition = _SHARD.sub("", row.get("partition") or "") or None
    return StoredEvent(present, row["event_timestamp"], row["received_at"], partition)
