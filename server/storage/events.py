"""The events table, and all SQL on it."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from operator import itemgetter
from typing import NamedTuple

from psycopg2.errors import InternalError_, UniqueViolation
from psycopg2.extensions import connection as DriverConnection
from psycopg2.extensions import cursor as Cursor
from sqlalchemy import Connection

from server import failpoints
from server.events.copy_rows import COPY_OPTIONS, Row
from server.storage.citus import HAS_CATALOG, has_distributed_events
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
# Citus opens a connection for each shard of a group, unless it is told to use one for each node.
_BEGIN_DISTRIBUTED = "SET LOCAL citus.multi_shard_modify_mode = 'sequential';"
# Locks and disks are the nodes', so these are for them too. They get all statements of the query
# for each of them that comes behind the one that says so.
_BEGIN_ON_NODES = """
SET LOCAL statement_timeout = {timeout_ms};
SET LOCAL lock_timeout = {lock_ms};
SET LOCAL citus.propagate_set_commands = 'local';
SET LOCAL synchronous_commit = {commit_level};
"""
# Of the server's levels of `synchronous_commit`, all others acknowledge before a disk has the data,
# or say no more than `on` does.
_STRONGER_LEVEL, _LEVEL = "remote_apply", "on"
_ASK_SECONDS = 1.0
_ASK = f"SELECT current_setting('synchronous_commit'), {HAS_CATALOG}"
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


class _Server(NamedTuple):
    """What the transactions of a connection depend on."""

    commit_level: str
    is_distributed: bool


class _Begin(NamedTuple):
    """How a transaction begins; Citus's nodes need a part in a query of its own."""

    statements: str
    on_nodes: str | None


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
        self._server = _Server(_LEVEL, is_distributed=False)
        self._server_of: DriverConnection | None = None
        self._server_until = clock()

    @property
    def is_distributed(self) -> bool:
        """Return whether the events are on several nodes, as far as is known."""
        return self._server.is_distributed

    def save(
        self, connection: Connection, rows: Sequence[Row], seconds: float, lock_seconds: float = 1.0
    ) -> None:
        """Commit the rows, each once however often it is given or had been stored.

        Returns when they are durable, which takes `seconds` at most, and `lock_seconds` for each
        lock. Raises Conflict, Refused, Fault or NodeFailed, having stored nothing; Unavailable,
        with the outcome unknown.
        """
        # The first of equals wins. Sorted as the primary key is, so that writers of the same rows
        # wait for each other instead of deadlocking.
        unique = {row.identity: row for row in reversed(rows)}
        ordered = sorted(unique.values(), key=itemgetter(0))
        with translated_errors(), raw_cursor(connection) as cursor:
            begin = _compose_begin(self._know_server(cursor), seconds, lock_seconds)
            stored = self._write(cursor, begin, ordered)
        if stored is None and len(ordered) < len(rows):
            stored = _count_projects(ordered)
        duplicates = Counter() if stored is None else _count_projects(rows) - stored
        if self._on_duplicates is not None and duplicates:
            self._on_duplicates(duplicates)

    def _know_server(self, cursor: Cursor) -> _Server:
        """Return what matters of the server; asks once a second.

        The level of its commits is its `synchronous_commit`, or `on` if that is weaker: a database
        that acknowledges before its disk, or its standby's, has the data is overruled.
        """
        if cursor.connection is not self._server_of or self._clock() >= self._server_until:
            cursor.execute(_ASK)
            level, has_catalog = cursor.fetchone() or (_LEVEL, False)
            level = _STRONGER_LEVEL if level == _STRONGER_LEVEL else _LEVEL
            self._server = _Server(level, has_catalog and has_distributed_events(cursor))
            self._server_of, self._server_until = cursor.connection, self._clock() + _ASK_SECONDS
        return self._server

    def _write(self, cursor: Cursor, begin: _Begin, rows: list[Row]) -> Counter[str] | None:
        """Commit rows that differ in their keys.

        Return how many of each project were new, or None if all were.
        """
        if self._clock() >= self._stage_until:
            try:
                _copy(cursor, _begin(cursor, begin) + self._copy, rows)
            except (UniqueViolation, InternalError_):  # Citus reports the one as the other
                cursor.execute("ROLLBACK")
                self._stage_until = self._clock() + _STAGING_SECONDS
            else:
                self._commit(cursor, rows)
                return None
        _copy(cursor, _begin(cursor, begin) + self._stage, rows)
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


def _compose_begin(server: _Server, seconds: float, lock_seconds: float) -> _Begin:
    values = {
        "timeout_ms": _to_milliseconds(seconds),
        "lock_ms": _to_milliseconds(lock_seconds),
        "commit_level": server.commit_level,
    }
    statements = _BEGIN.format(**values)
    if not server.is_distributed:
        return _Begin(statements, None)
    return _Begin(statements + _BEGIN_DISTRIBUTED, _BEGIN_ON_NODES.format(**values))


def _begin(cursor: Cursor, begin: _Begin) -> str:
    """Begin a transaction, or return what is to be sent before its first statement."""
    if begin.on_nodes is None:
        return begin.statements
    cursor.execute(begin.statements)
    cursor.execute(begin.on_nodes)
    return ""


def _count_projects(rows: Sequence[Row]) -> Counter[str]:
    return Counter(row.identity[0] for row in rows)


def _to_milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _copy(cursor: Cursor, statement: str, rows: list[Row]) -> None:
    content = BytesIO("".join(row.text for row in rows).encode())
    cursor.copy_expert(statement, content, _COPY_BUFFER_BYTES)
    if cursor.rowcount != len(rows):
        raise RuntimeError(f"COPY took {cursor.rowcount} of {len(rows)} rows")
