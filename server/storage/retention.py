"""Takes old months off the events table, and old rows out of its default partition."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from server.storage.citus import bound_locks, is_distributed, measure_pages
from server.storage.errors import translated_errors

# As much of the default partition as one transaction reads: 4 MB.
_PAGES = 512

_LIST = """
SELECT CAST(oid AS regclass)::text AS name, {size} AS size, {rows} AS rows
  FROM (
    SELECT c.oid, c.reltuples,
           substring(pg_get_expr(c.relpartbound, c.oid) FROM $$TO \\('([^']+)'\\)$$) AS ends_at
      FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE inhparent = 'events'::regclass
  ) AS partitions
 WHERE CAST(ends_at AS timestamptz) <= :cut ORDER BY CAST(ends_at AS timestamptz)
"""
_LIST_PLAIN = text(
    _LIST.format(
        size="pg_total_relation_size(oid)",
        rows="CASE WHEN reltuples < 0 THEN NULL ELSE CAST(reltuples AS bigint) END",
    )
)
# Citus's nodes have the rows, in shards.
_LIST_DISTRIBUTED = text(
    _LIST.format(
        size="citus_total_relation_size(oid)",
        rows="""(
    SELECT CASE WHEN min(CAST(result AS real)) >= 0
                THEN CAST(sum(CAST(result AS real)) AS bigint) END
      FROM run_command_on_shards(oid, $$
        SELECT reltuples FROM pg_class WHERE oid = '%s'::regclass $$))""",
    )
)
# The default partition's own lock comes with the parent's, since its bounds change too. Each is
# waited for so long at the most, with ingestion waiting behind: a long reader makes this fail.
_BEGIN = """
SET LOCAL lock_timeout = '200ms';
SELECT pg_advisory_xact_lock('events'::regclass::oid::bigint);
"""
_COUNT_DEFAULT = text("SELECT count(*) FROM events_default WHERE event_timestamp < :cut")
_MEASURE_DEFAULT = text("""
SELECT pg_relation_size('events_default') / current_setting('block_size')::bigint
""")
_DELETE_DEFAULT = text("""
DELETE FROM events_default WHERE event_timestamp < :cut
   AND ctid >= format('(%s,0)', CAST(:start AS bigint))::tid
   AND ctid < format('(%s,0)', CAST(:end AS bigint))::tid
""")


@dataclass(frozen=True)
class Partition:
    """A partition of the events table.

    `size` is in bytes, `rows` an estimate if there is one; `name` is as SQL has it, quotes and all.
    """

    name: str
    size: int
    rows: int | None


def list_expired_partitions(connection: Connection, cut: datetime) -> list[Partition]:
    """Return the partitions whose events all lie before `cut`, the oldest first."""
    statement = _LIST_DISTRIBUTED if is_distributed(connection) else _LIST_PLAIN
    rows = connection.execute(statement, {"cut": cut}).mappings()
    # A partition that was dropped meanwhile has no size.
    return [Partition(**row) for row in rows if row["size"] is not None]


def drop_partition(connection: Connection, partition: Partition) -> None:
    """Drop a partition with its events.

    Raises Conflict where a lock cannot be had at once; ingestion waits less than a second for that.
    """
    # DETACH CONCURRENTLY would do with less, but not beside a default partition.
    with translated_errors(), connection.begin():
        connection.exec_driver_sql(_BEGIN)
        bound_locks(connection)
        connection.exec_driver_sql("LOCK TABLE ONLY events IN ACCESS EXCLUSIVE MODE")
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {partition.name}")


def count_expired_rows(connection: Connection, cut: datetime) -> int:
    """How many events in the default partition lie before `cut`; reads all of it."""
    return int(connection.scalar(_COUNT_DEFAULT, {"cut": cut}) or 0)


def delete_expired_rows(connection: Connection, cut: datetime) -> Iterator[int]:
    """Delete events before `cut` from the default partition; yield each transaction's count."""
    with connection.begin():
        pages = _measure_default(connection)
    for start in range(0, pages, _PAGES):
        with connection.begin():
            values = {"cut": cut, "start": start, "end": start + _PAGES}
            deleted = connection.execute(_DELETE_DEFAULT, values).rowcount
        yield deleted


def _measure_default(connection: Connection) -> int:
    if is_distributed(connection):
        return measure_pages(connection, "events_default")
    return int(connection.scalar(_MEASURE_DEFAULT) or 0)
