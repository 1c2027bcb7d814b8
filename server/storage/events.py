"""The events table, and all SQL on it."""

import time
from collections.abc import Callable, Sequence
from io import BytesIO
from operator import itemgetter

from psycopg2.errors import UniqueViolation
from psycopg2.extensions import cursor as Cursor
from sqlalchemy import Connection

from server import failpoints
from server.events.copy_rows import COPY_OPTIONS, Row
from server.storage.connection import raw_cursor
from server.storage.errors import Conflict, Refused, translated_errors

# After a duplicate for so long, since clients that send again do so in bursts.
_STAGING_SECONDS = 5.0
_COPY_BUFFER_BYTES = 1 << 18

# One round trip with the COPY behind it. The settings are local to the transaction, so that they
# hold under PgBouncer too; a database that acknowledges before its disk has the data is overruled.
_BEGIN = """
BEGIN;
SET LOCAL statement_timeout = {timeout_ms};
SELECT set_config('synchronous_commit', 'on', true)
 WHERE current_setting('synchronous_commit') = 'off';
"""
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

# Called in the transaction, with what it has stored, sorted by identity; returns the SQL that
# belongs to it as well.
AlsoStore = Callable[[Cursor, Sequence[Row]], bytes]


class EventStore:
    """Writes groups of rows to the events table, each group in one transaction."""

    def __init__(
        self,
        columns: Sequence[str],
        also_store: AlsoStore | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_duplicates: Callable[[int], None] | None = None,
    ) -> None:
        names = ", ".join(columns)
        self._copy = _COPY.format(table="events", columns=names)
        self._stage = _CREATE_STAGING + _COPY.format(table="staged_events", columns=names)
        self._move = _MOVE_STAGED.format(columns=names) + (_RETURN_IDENTITIES if also_store else "")
        self._also_store = also_store
        # Whether the rows must come with their protobuf.
        self.needs_encoded = also_store is not None
        self._on_duplicates = on_duplicates
        self._clock = clock
        self._stage_until = clock()

    def save(self, connection: Connection, rows: Sequence[Row], seconds: float) -> None:
        """Commits the rows, each once however often it is given or had been stored.

        Returns when they are durable. Raises Conflict or Refused, having stored nothing;
        Unavailable, with the outcome unknown.
        """
        # The first of equals wins. Sorted as the primary key is, so that writers of the same rows
        # wait for each other instead of deadlocking.
        unique = {row.identity: row for row in reversed(rows)}
        ordered = sorted(unique.values(), key=itemgetter(0))
        begin = _BEGIN.format(timeout_ms=max(1, int(seconds * 1000)))
        with raw_cursor(connection) as cursor:
            try:
                with translated_errors():
                    stored = self._write(cursor, begin, ordered)
            except (Conflict, Refused):
                cursor.execute("ROLLBACK")
                raise
        if self._on_duplicates is not None and stored < len(rows):
            self._on_duplicates(len(rows) - stored)

    def _write(self, cursor: Cursor, begin: str, rows: list[Row]) -> int:
        """Commits rows that differ in their keys; returns how many of them were new."""
        if self._clock() >= self._stage_until:
            try:
                _copy(cursor, begin + self._copy, rows)
            except UniqueViolation:
                cursor.execute("ROLLBACK")
                self._stage_until = self._clock() + _STAGING_SECONDS
            else:
                self._commit(cursor, rows)
                return len(rows)
        _copy(cursor, begin + self._stage, rows)
        cursor.execute(self._move)
        count = cursor.rowcount
        if self._also_store is not None:
            stored = set(cursor.fetchall())
            rows = [row for row in rows if row.identity in stored]
        self._commit(cursor, rows)
        return count

    def _commit(self, cursor: Cursor, stored: list[Row]) -> None:
        more = self._also_store(cursor, stored) if self._also_store is not None and stored else b""
        failpoints.reach(failpoints.BEFORE_COMMIT)
        cursor.execute(more + b"COMMIT")  # in one round trip
        failpoints.reach(failpoints.AFTER_COMMIT)


def _copy(cursor: Cursor, statement: str, rows: list[Row]) -> None:
    content = BytesIO("".join(row.text for row in rows).encode())
    cursor.copy_expert(statement, content, _COPY_BUFFER_BYTES)
    if cursor.rowcount != len(rows):
        raise RuntimeError(f"COPY took {cursor.rowcount} of {len(rows)} rows")
