"""Distributes the tables over the nodes of Citus, and tells whether that is done."""

from collections.abc import Generator, Iterator

from sqlalchemy import Connection, Engine, TextClause, text

from server.storage.citus import check_coordinator, has_citus, is_distributed
from server.storage.connection import connected
from server.storage.errors import Conflict, DatabaseError, translated_errors

_IS_KNOWN = text("SELECT EXISTS (SELECT FROM pg_dist_node WHERE groupid = 0)")
_COUNT_NODES = text("SELECT count(*) FROM pg_dist_node WHERE shouldhaveshards AND isactive")
_FIND_AWAY = text("""
SELECT DISTINCT to_nodename || ':' || to_nodeport AS node FROM citus_check_cluster_node_health()
 WHERE result IS NOT TRUE ORDER BY 1
""")
_READ_COLUMN = text("""
SELECT distribution_column FROM citus_tables WHERE table_name = 'events'::regclass
""")
_FIND_APART = text("""
SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'events'::regclass
   AND NOT EXISTS (
    SELECT FROM pg_dist_partition p JOIN pg_dist_partition e USING (colocationid)
     WHERE p.logicalrelid = inhrelid AND e.logicalrelid = 'events'::regclass)
 ORDER BY 1
""")
# All other tables of the owner of `events`, which stay where they are: each node then sends to them
# what needs them. What holds their rows is a table too, a shard.
_FIND_UNKNOWN = text("""
SELECT relname FROM pg_class WHERE relkind = 'r' AND NOT relispartition
   AND (relnamespace, relowner) =
       (SELECT relnamespace, relowner FROM pg_class WHERE oid = 'events'::regclass)
   AND NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = pg_class.oid)
   AND NOT EXISTS (SELECT FROM pg_dist_shard WHERE relname = shard_name(logicalrelid, shardid))
 ORDER BY 1
""")
# The rows that were there before are copied; those that were copied stay behind, hidden.
_HAS_LEFTOVERS = text("""
SELECT coalesce(max(pg_relation_size(inhrelid)), 0) > 0 FROM pg_inherits
 WHERE inhparent = 'events'::regclass
""")
_DISTRIBUTE = text("""
SELECT create_distributed_table('events', 'project_id', shard_count => :shards)
""")
_TRUNCATE_LEFTOVERS = text("SELECT truncate_local_data_after_distributing_table('events')")
_ADD = text("SELECT citus_add_local_table_to_metadata(to_regclass(quote_ident(:name)))")
# For a lock. Ingestion waits behind it.
_BEGIN = "SET LOCAL lock_timeout = '5s'"


def find_undone(connection: Connection) -> list[str]:
    """Return what is left to do, a line for each. Raises DatabaseError if there is no cluster."""
    _check_cluster(connection)
    if not is_distributed(connection):
        return ["the table events is on one node"]
    if (column := connection.scalar(_READ_COLUMN)) != "project_id":
        raise DatabaseError(f"the table events is distributed by {column}, not by project_id")
    undone = [f"{name} is not on the nodes of events" for name in connection.scalars(_FIND_APART)]
    undone += [
        f"the other nodes do not know the table {name}"
        for name in connection.scalars(_FIND_UNKNOWN).all()
    ]
    if connection.scalar(_HAS_LEFTOVERS):
        undone.append("rows of events that were copied to the nodes are also on the coordinator")
    return undone


def _check_cluster(connection: Connection) -> None:
    """Raise DatabaseError unless this is the coordinator of a cluster whose nodes all answer."""
    if not has_citus(connection):
        raise DatabaseError("the database has no Citus: CREATE EXTENSION citus on every node")
    check_coordinator(connection)
    if not connection.scalar(_IS_KNOWN):
        raise DatabaseError(
            "the other nodes do not know the coordinator: SELECT citus_set_coordinator_host(…)"
        )
    if not connection.scalar(_COUNT_NODES):
        raise DatabaseError("no node takes shards: SELECT citus_add_node(…) for each worker")
    if away := connection.scalars(_FIND_AWAY).all():
        raise DatabaseError(f"not every node reaches {', '.join(away)}")


def distribute(engine: Engine, shards: int) -> Generator[str]:
    """Do what is left to do, and yield what was done. Raises DatabaseError.

    Whatever interrupts it, the next run goes on with what is missing.
    """
    with connected(engine) as connection:
        with connection.begin():
            _check_cluster(connection)
        yield from _spread_events(connection, shards)
        yield from add_small_tables(connection)
        with connection.begin():
            if undone := find_undone(connection):
                raise DatabaseError("; ".join(undone))


def _spread_events(connection: Connection, shards: int) -> Iterator[str]:
    with connection.begin():
        nodes, is_done = connection.scalar(_COUNT_NODES), is_distributed(connection)
    if not is_done:
        _change(connection, _DISTRIBUTE, shards=shards)
        yield f"distributed the table events by project_id: {shards} shards on {nodes} nodes"
    with connection.begin():
        has_leftovers = connection.scalar(_HAS_LEFTOVERS)
    if has_leftovers:
        _change(connection, _TRUNCATE_LEFTOVERS)
        yield "removed from the coordinator the rows that were copied to the nodes"


def add_small_tables(connection: Connection) -> Iterator[str]:
    """Make the small tables known to every node, and yield what was done."""
    with connection.begin():
        unknown = connection.scalars(_FIND_UNKNOWN).all()
    for name in unknown:
        _change(connection, _ADD, name=name)
        yield f"made the table {name} known to every node"


def _change(connection: Connection, statement: TextClause, **values: object) -> None:
    try:
        with translated_errors(), connection.begin():
            connection.exec_driver_sql(_BEGIN)
            connection.execute(statement, values)
    except Conflict as error:
        raise DatabaseError("the tables are in use: try again in a quiet moment") from error
