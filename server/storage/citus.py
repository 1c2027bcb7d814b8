"""Citus, an extension that spreads a table over the servers of a cluster, its nodes.

The events are distributed by their project: each shard has some projects, and a copy of the whole
tree of partitions. All other tables stay on the coordinator, and the other nodes know them.
"""

from psycopg2.extensions import cursor as Cursor
from sqlalchemy import Connection, text

from server.storage.errors import DatabaseError

# A database without the extension has no such table, which a query must not name then.
HAS_CATALOG = "to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL"
_IS_DISTRIBUTED = """
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_dist_partition WHERE logicalrelid = to_regclass('public.events'))
"""
_MEASURE_SHARDS = text("""
SELECT max(shard_size) / current_setting('block_size')::bigint FROM citus_shards
 WHERE table_name IN (
    SELECT inhrelid FROM pg_inherits
     WHERE inhparent = 'events'::regclass
       AND inhrelid = coalesce(to_regclass(CAST(:name AS text)), inhrelid))
""")
_IS_COORDINATOR = text("SELECT groupid = 0 FROM pg_dist_local_group")


def has_citus(connection: Connection) -> bool:
    """Return whether the database has the extension, whether events are distributed or not."""
    return bool(connection.scalar(text(f"SELECT {HAS_CATALOG}")))


def is_distributed(connection: Connection) -> bool:
    """Return whether the events are on several nodes."""
    return has_citus(connection) and bool(connection.scalar(text(_IS_DISTRIBUTED)))


def has_distributed_events(cursor: Cursor) -> bool:
    """Return whether the events are on several nodes, if the database has Citus's catalog."""
    cursor.execute(_IS_DISTRIBUTED)
    return cursor.fetchone() == (True,)


def can_change_tables(connection: Connection) -> bool:
    """Return whether tables can be changed here: on a cluster's coordinator, or without Citus."""
    return not has_citus(connection) or bool(connection.scalar(_IS_COORDINATOR))


def check_coordinator(connection: Connection) -> None:
    """Raise DatabaseError if tables can be changed on another node only."""
    if not can_change_tables(connection):
        raise DatabaseError("this node is not the coordinator: DATABASE_URL has to name that")


def bound_locks(connection: Connection) -> None:
    """Make the transaction's `lock_timeout` hold on all nodes, if the events are on several."""
    if is_distributed(connection):
        timeout = connection.scalar(text("SHOW lock_timeout"))
        connection.exec_driver_sql("SET LOCAL citus.propagate_set_commands = 'local'")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{timeout}'")


def measure_pages(connection: Connection, partition: str | None = None) -> int:
    """Return the pages of the largest shard of one partition, or of all partitions."""
    return int(connection.scalar(_MEASURE_SHARDS, {"name": partition}) or 0)
