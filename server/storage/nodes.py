"""The nodes of a cluster of Citus: which there are, which has a project's events, which answers."""

from collections.abc import Collection
from typing import NamedTuple

from sqlalchemy import Connection, text

from server.storage.citus import has_citus

_FIND_NODES = text("""
SELECT groupid, nodename, nodeport FROM pg_dist_node WHERE isactive AND noderole = 'primary'
""")
# A catalogue's answer, which the coordinator gives without its nodes.
_LOCATE = text("""
WITH located AS MATERIALIZED (
    SELECT project, get_shard_id_for_distribution_column('events', project) AS shardid
      FROM unnest(CAST(:projects AS text[])) AS project)
SELECT project, groupid, nodename, nodeport
  FROM located JOIN pg_dist_placement USING (shardid) JOIN pg_dist_node USING (groupid)
 WHERE noderole = 'primary'
""")
# On a new connection each time, which no earlier one to a frozen node can stand in for.
_ASK = """
SET LOCAL citus.node_connection_timeout = {milliseconds};
SET LOCAL citus.max_cached_conns_per_worker = 0;
"""
_ANSWERS = text("SELECT citus_check_connection_to_node(:host, :port)")


class Node(NamedTuple):
    """Names a node by its group and address; a standby that replaces it is another node."""

    group: int
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def find_nodes(connection: Connection) -> list[Node]:
    """Return the nodes of the cluster; none of a single server."""
    if not has_citus(connection):
        return []
    return [Node(*row) for row in connection.execute(_FIND_NODES)]


def locate_projects(connection: Connection, projects: Collection[str]) -> dict[str, Node]:
    """Return the node of each project's events; nothing on a single server."""
    if not has_citus(connection):
        return {}
    found = connection.execute(_LOCATE, {"projects": list(projects)})
    return {project: Node(*place) for project, *place in found}


def answers(connection: Connection, node: Node, seconds: float) -> bool:
    """Return whether the node answers a query on a new connection within `seconds`."""
    connection.exec_driver_sql(_ASK.format(milliseconds=int(seconds * 1000)))
    return bool(connection.scalar(_ANSWERS, {"host": node.host, "port": node.port}))
