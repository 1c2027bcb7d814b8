"""The events table, and all SQL on it."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from operator import itemgetter

from psycopg2.errors import InternalError_, UniqueViolation
from psycopg2.extensions import connection as DriverConnection
from psycopg2.extensions import cursor as Cursor
from sqlalchemy import Connection

from server import failpoints
from server.events.copy_rows import COPY_OPTIONS, Row
from server.storage.connection import (
    KEEPALIVES,
    SEARCH_PATH,
    WARNINGS,
    raw_cursor,
    require_silence,
)
from server.storage.errors import translated_errors

# After a duplicate for so long, since clients that send again do so in bursts.
_STAGING_SECONDS = 5.0
_COPY_BUFFER_BYTES = 1 << 18

# One round trip with the COPY behind it. Plain statements: a SELECT of set_config would cost the
# server as much as all of them.
_BEGIN = f"""
BEGIN ISOLATION LEVEL READ COMMITTED;
{SEARCH_PATH}
{KEEPALIVES}
SET LOCAL idle_in_transaction_session_timeout = {{timeout_ms}};
SET LOCAL statement_timeout = {{timeout_ms}};
SET LOCAL lock_timeout = {{lock_ms}};
SET LOCAL synchronous_commit = {{commit_level}};
{WARNINGS}
"""
# Of the server's levels of `synchronous_commit`, all others acknowledge before a disk has the data,
# or say no more than `on` does.
_STRONGER_LEVEL, _LEVEL = "remote_apply", "on"
_LEVEL_SECONDS = 1.0
_COPY = f"COPY {{table}} ({{columns}}) FROM STDIN ({COPY_OPTIONS})"
_CREATE_STAGING = "CREATE TEMP TABLE staged_events (LIKE events INCLUDING DEFAULTS) ON COMMIT DROP;"
_MOVE_STAGED = """
INSERT INTO events ({columns}) SELECT {columns} FROM staged_events
 ORDER BY project_id, event_timestamp, event_id
    ON CONFLICT DO NOTHING
"""
# The identities of the rows that were new.
_RETURN_IDENTITIES = """
RETURNING project_id, CAST(extract(epoch FROM event_timestamp) * 1000000 AS bigint), event_id
"""
_RETURN_PROJECTS = "RETURNING project_id"

# Called in the transaction, with what it has stored, sorted by identity; returns the SQL that
# belongs to it as well.
AlsoStore = Callable[[Cursor, Sequence[Row]], bytes]


class EventStore:
    """Writes groups of rows to the events table, each group in one transaction.

    Calls `on_duplicates` with the number of duplicates of each project, if a group has any.
    """

    def __init__(
        self,
        columns: Sequence[str],
        also_store: AlsoStore | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_duplicates: Callable[[Mapping[str, int]], None] | None = None,
    ) -> None:
        names = ", ".join(columns)
        self._copy = _COPY.format(table="events", columns=names)
        self._stage = _CREATE_STAGING + _COPY.format(table="staged_events", columns=names)
        self._move = _MOVE_STAGED.format(columns=names) + (
            _RETURN_IDENTITIES if also_store else _RETURN_PROJECTS
        )
        self._also_store = also_store
        # Whether the rows must come with their protobuf.
        self.needs_encoded = also_store is not None
        self._on_duplicates = on_duplicates
        self._clock = clock
        self._stage_until = clock()
        self._commit_level = _LEVEL
        self._level_of: DriverConnection | None = None
        self._level_until = clock()

    def save(
        self, connection: Connection, rows: Sequence[Row], seconds: float, lock_seconds: float = 1.0
    ) -> None:
        """Commit the rows, each once however often it is given or had been stored.

        Returns when they are durable, which takes `seconds` at most, and `lock_seconds` for each
        lock. Raises Conflict, Refused or Fault, having stored nothing; Unavailable, with the
        outcome unknown.
        """
        # The first of equals wins. Sorted as the primary key is, so that writers of the same rows
        # wait for each other instead of deadlocking.
        unique = {row.identity: row for row in reversed(rows)}
        ordered = sorted(unique.values(), key=itemgetter(0))
        with translated_errors(), raw_cursor(connection) as cursor:
            begin = _BEGIN.format(
                timeout_ms=_to_milliseconds(seconds),
                lock_ms=_to_milliseconds(lock_seconds),
                commit_level=self._find_commit_level(cursor),
            )
            stored = self._write(cursor, begin, ordered)
        if stored is None and len(ordered) < len(rows):
            stored = _count_projects(ordered)
        duplicates = Counter() if stored is None else _count_projects(rows) - stored
        if self._on_duplicates is not None and duplicates:
            self._on_duplicates(duplicates)

    def _find_commit_level(self, cursor: Cursor) -> str:
        """Return the server's `synchronous_commit`, or `on` if that is weaker; asks once a second.

        A database that acknowledges before its disk, or its standby's, has the data is overruled.
        """
        if cursor.connection is not self._level_of or self._clock() >= self._level_until:
            cursor.execute("SHOW synchronous_commit")
            is_stronger = cursor.fetchone() == (_STRONGER_LEVEL,)
            self._commit_level = _STRONGER_LEVEL if is_stronger else _LEVEL
            self._level_of, self._level_until = cursor.connection, self._clock() + _LEVEL_SECONDS
        return self._commit_level

    def _write(self, cursor: Cursor, begin: str, rows: list[Row]) -> Counter[str] | None:
        """Commit rows that differ in their keys.

        Return how many of each project were new, or None if all were.
        """
        if self._clock() >= self._stage_until:
            try:
                _copy(cursor, begin + self._copy, rows)
            except (UniqueViolation, InternalError_):  # Citus reports the one as the other
                cursor.execute("ROLLBACK")
                self._stage_until = self._clock() + _STAGING_SECONDS
            else:
                self._commit(cursor, rows)
                return None
        _copy(cursor, begin + self._stage, rows)
        cursor.execute(self._move)
        returned = cursor.fetchall()
        if self._also_store is not None:
            stored = set(returned)
            rows = [row for row in rows if row.identity in stored]
        self._commit(cursor, rows)
        return Counter(project_id for project_id, *_ in returned)

    def _commit(self, cursor: Cursor, stored: list[Row]) -> None:
        more = self._also_store(cursor, stored) if self._also_store is not None and stored else b""
        failpoints.reach(failpoints.BEFORE_COMMIT)
        del cursor.connection.notices[:]
        cursor.execute(more + b"COMMIT")  # in one round trip
        require_silence(cursor.connection)
        failpoints.reach(failpoints.AFTER_COMMIT)


def _count_projects(rows: Sequence[Row]) -> Counter[str]:
    return Counter(row.identity[0] for row in rows)


def _to_milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _copy(cursor: Cursor, statement: str, rows: list[Row]) -> None:
    content = BytesIO("".join(row.text for row in rows).encode())
    cursor.copy_expert(statement, content, _COPY_BUFFER_BYTES)
    if cursor.rowcount != len(rows):
        raise RuntimeError(f"COPY took {cursor.rowcount} of {len(rows)} rows")
