"""Takes old months off the events table, and old rows out of its default partition."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from server.storage.errors import translated_errors

# As much of the default partition as one transaction reads: 4 MB.
_PAGES = 512

_LIST = text("""
SELECT CAST(oid AS regclass)::text AS name, pg_total_relation_size(oid) AS size,
       CASE WHEN reltuples < 0 THEN NULL ELSE CAST(reltuples AS bigint) END AS rows
  FROM (
    SELECT c.oid, c.reltuples,
           substring(pg_get_expr(c.relpartbound, c.oid) FROM $$TO \\('([^']+)'\\)$$) AS ends_at
      FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE inhparent = 'events'::regclass
  ) AS partitions
 WHERE CAST(ends_at AS timestamptz) <= :cut ORDER BY CAST(ends_at AS timestamptz)
""")
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
    rows = connection.execute(_LIST, {"cut": cut}).mappings()
    # A partition that was dropped meanwhile has no size.
    return [Partition(**row) for row in rows if row["size"] is not None]


def drop_partition(connection: Connection, partition: Partition) -> None:
    """Drop a partition with its events.

    Raises Conflict where a lock cannot be had at once; ingestion waits less than a second for that.
    """
    # DETACH CONCURRENTLY would do with less, but not beside a default partition.
    with translated_errors(), connection.begin():
        connection.exec_driver_sql(_BEGIN)
        connection.exec_driver_sql("LOCK TABLE ONLY events IN ACCESS EXCLUSIVE MODE")
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {partition.name}")


def count_expired_rows(connection: Connection, cut: datetime) -> int:
    """How many events in the default partition lie before `cut`; reads all of it."""
    return int(connection.scalar(_COUNT_DEFAULT, {"cut": cut}) or 0)


def delete_expired_rows(connection: Connection, cut: datetime) -> Iterator[int]:
    """Delete events before `cut` from the default partition; yield each transaction's count."""
    with connection.begin():
        pages = int(connection.scalar(_MEASURE_DEFAULT) or 0)
    for start in range(0, pages, _PAGES):
        with connection.begin():
            values = {"cut": cut, "start": start, "end": start + _PAGES}
            deleted = connection.execute(_DELETE_DEFAULT, values).rowcount
        yield deleted
