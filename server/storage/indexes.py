"""The index on the arrival of events, built partition by partition beside a running service.

A partitioned table takes no concurrent index: the parent's index begins without any of the
partitions, each partition's is built concurrently and then attached, and new partitions are made
with theirs. Whatever interrupts this, the next build continues with what is missing.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from server.storage.connection import connected
from server.storage.errors import Conflict, DatabaseError, tolerated_drop, translated_errors

_ADVISORY_LOCK = 0x7067_696E_6465_7865  # "pgindexe"
_LOCK_TRIES = 60
_RETRY_SECONDS = 1.0

# Arrivals grow with the table, so that a summary of each megabyte tells which ones to read: the
# index has a few kilobytes, and costs ingestion nothing that can be measured.
_DEFINITION = "USING brin (received_at) WITH (autosummarize = on)"
_CREATE_PARENT = f"CREATE INDEX events_received_at ON ONLY events {_DEFINITION}"
_FIND_PARENT = text("SELECT to_regclass('events_received_at')")
_LIST_MISSING = text("""
SELECT p.inhrelid::regclass::text AS partition, c.relname || '_received_at_idx' AS index
  FROM pg_inherits p JOIN pg_class c ON c.oid = p.inhrelid
 WHERE p.inhparent = 'events'::regclass AND NOT EXISTS (
    SELECT FROM pg_inherits i JOIN pg_index x ON x.indexrelid = i.inhrelid
     WHERE i.inhparent = to_regclass('events_received_at') AND x.indrelid = p.inhrelid
 ) ORDER BY c.relname
""")
_READ_VALIDITY = text("""
SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(quote_ident(:index))
""")
_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(:key)")


def count_missing_indexes(connection: Connection) -> int:
    """Return how many partitions of the events table have no index on `received_at` yet."""
    return len(connection.execute(_LIST_MISSING).all())


def build_indexes(engine: Engine) -> None:
    """Build the index on each partition that lacks it. Raises DatabaseError."""
    with connected(engine.execution_options(isolation_level="AUTOCOMMIT")) as connection:
        if not count_missing_indexes(connection):
            return
        with _lock(engine):
            if connection.scalar(_FIND_PARENT) is None:
                _repeat(lambda: _execute_patiently(connection, _CREATE_PARENT))
            for partition, index in connection.execute(_LIST_MISSING).all():
                with tolerated_drop():
                    _build(connection, partition, index)


@contextmanager
def _lock(engine: Engine) -> Iterator[None]:
    """Let several commands take turns.

    The lock is tried, not waited for: a concurrent build waits for every statement that runs, and
    so would wait for one that waits for the lock.
    """
    with connected(engine) as holder:
        while not holder.scalar(_TRY_LOCK, {"key": _ADVISORY_LOCK}):
            holder.rollback()
            time.sleep(_RETRY_SECONDS)
        yield
        holder.rollback()


def _build(connection: Connection, partition: str, index: str) -> None:
    is_valid = connection.scalar(_READ_VALIDITY, {"index": index})
    if is_valid is False:  # an interrupted build left it behind
        connection.exec_driver_sql(f"DROP INDEX CONCURRENTLY {index}")
    if not is_valid:
        connection.exec_driver_sql(
            f"CREATE INDEX CONCURRENTLY {index} ON {partition} {_DEFINITION}"
        )
    attach = f"ALTER INDEX events_received_at ATTACH PARTITION {index}"
    _repeat(lambda: _execute_patiently(connection, attach))


def _execute_patiently(connection: Connection, statement: str) -> None:
    """Run a statement that needs a lock for a moment, in which ingestion must not wait long."""
    with translated_errors():
        connection.exec_driver_sql("BEGIN")
        try:
            connection.exec_driver_sql("SET LOCAL lock_timeout = '500ms'")
            connection.exec_driver_sql(statement)
            connection.exec_driver_sql("COMMIT")
        except DBAPIError:
            connection.exec_driver_sql("ROLLBACK")
            raise


def _repeat(attempt: Callable[[], None]) -> None:
    for _ in range(_LOCK_TRIES):
        try:
            return attempt()
        except Conflict:
            time.sleep(_RETRY_SECONDS)
    raise DatabaseError(
        "the events table could not be locked, because a transaction has been writing to it all the"
        " time; run 'productgraph migrate' again later"
    )
