"""The table of rejected events, and all SQL on it.

Whoever deletes rows locks them in the order of their ids or skips those that are locked, so that
any number of services and commands can do so at once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, RowMapping, TextClause, text

from server.events.event_ids import read_event_id
from server.events.schema import EVENT_SCHEMA
from server.storage.pages import read_in_pages

MAX_EVENT_BYTES = EVENT_SCHEMA.max_bytes
# What validation rejects is in the table within this time, or never.
KEPT_WITHIN_SECONDS = 330.0
# How many rows one statement deletes at the most.
_DELETED_AT_ONCE = 1000
_READ_AT_ONCE = 200

# What a crash of the database forgets of these is not worth a wait for the disk, which ingestion
# needs.
_BEGIN_LIGHTLY = text("SET LOCAL synchronous_commit = off")
_INSERT = text("""
INSERT INTO rejected_events (project_id, received_at, protocol, reason, size, event, event_id)
SELECT * FROM unnest(
    CAST(:project_ids AS text[]), CAST(:received_at AS timestamptz[]), CAST(:protocols AS text[]),
    CAST(:reasons AS text[]), CAST(:sizes AS integer[]), CAST(:events AS bytea[]),
    CAST(:event_ids AS text[])
)
""")
_FIND_CROWDED = text("""
SELECT project_id FROM rejected_events GROUP BY project_id HAVING count(*) > :count
""")
_DELETE_SURPLUS = text("""
DELETE FROM rejected_events WHERE id = ANY (ARRAY(
    SELECT id FROM rejected_events WHERE project_id = :project_id AND (received_at, id) <= (
        SELECT received_at, id FROM rejected_events WHERE project_id = :project_id
         ORDER BY received_at DESC, id DESC OFFSET :count LIMIT 1
    ) ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
))
""")
_DELETE_EXPIRED = text("""
DELETE FROM rejected_events WHERE id = ANY (ARRAY(
    SELECT id FROM rejected_events WHERE received_at < :cut
     ORDER BY received_at LIMIT :limit FOR UPDATE SKIP LOCKED
))
""")
_COUNT_EXPIRED = text("SELECT count(*) FROM rejected_events WHERE received_at < :cut")
_COLUMNS = "id, project_id, received_at, protocol, reason, size"
_LIST = text(f"""
SELECT {_COLUMNS}, ''::bytea AS event FROM rejected_events
 WHERE CAST(:project_id AS text) IS NULL OR project_id = :project_id
 ORDER BY received_at DESC, id DESC LIMIT :limit
""")  # noqa: S608 - the columns are a constant
_READ = text(f"SELECT {_COLUMNS}, event FROM rejected_events WHERE id = :id")  # noqa: S608 - as above
_FIND_BY_EVENT = text(f"""
SELECT {_COLUMNS}, event FROM rejected_events
 WHERE event_id = :event_id AND (CAST(:project_id AS text) IS NULL OR project_id = :project_id)
 ORDER BY received_at, id LIMIT :limit
""")  # noqa: S608 - as above
# The reasons name what was sent, between quotes, and limits.
_GROUP_NEWEST = text("""
SELECT (array_agg(reason ORDER BY received_at DESC, id DESC))[1] AS reason, count(*) AS count,
       (array_agg(DISTINCT project_id))[1:5] AS projects,
       (array_agg(id ORDER BY received_at DESC, id DESC))[1:3] AS newest_ids,
       max(received_at) AS last_at
  FROM (
    SELECT id, project_id, received_at, reason,
           regexp_replace(reason, '''.*''|[0-9]+', '', 'g') AS kind
      FROM rejected_events ORDER BY received_at DESC, id DESC LIMIT :newest
  ) AS named
 GROUP BY kind ORDER BY count DESC, last_at DESC LIMIT :limit
""")
_FIND_OLDEST = text("SELECT min(received_at) FROM rejected_events")
_FIND_NEWEST = text("SELECT coalesce(max(id), 0) FROM rejected_events")
_READ_PAGE = text(f"""
SELECT {_COLUMNS}, event FROM rejected_events
 WHERE (CAST(:project_id AS text) IS NULL OR project_id = :project_id)
   AND (cardinality(CAST(:ids AS bigint[])) = 0 OR id = ANY(:ids))
   AND id > :after AND id <= :newest
 ORDER BY id LIMIT :limit
""")  # noqa: S608 - as above
_LOCK = text("SELECT id FROM rejected_events WHERE id = ANY(:ids) ORDER BY id FOR UPDATE")
_DELETE = text("DELETE FROM rejected_events WHERE id = ANY(:ids)")
_SET_REASONS = text("""
UPDATE rejected_events SET reason = new.reason
  FROM unnest(CAST(:ids AS bigint[]), CAST(:reasons AS text[])) AS new (id, reason)
 WHERE rejected_events.id = new.id AND rejected_events.reason <> new.reason
""")


@dataclass(frozen=True, slots=True)
class Rejection:
    """An event that validation refused.

    `event` is what was received, its first MAX_EVENT_BYTES where `size` says that it was longer.
    """

    project_id: str
    received_at: datetime
    protocol: str
    reason: str
    size: int
    event: bytes

    @property
    def is_cut(self) -> bool:
        """Whether a part of the event is missing."""
        return self.size > len(self.event)


@dataclass(frozen=True, slots=True)
class StoredRejection(Rejection):
    """A row of the table."""

    id: int

    @property
    def summary(self) -> dict[str, object]:
        """What a list says of it."""
        names = ("id", "received_at", "protocol", "project_id", "size", "reason")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class RejectionGroup:
    """Rejected events of which the reasons differ in names and numbers only.

    `reason` is that of the newest; `newest_ids` are the numbers of a few of them.
    """

    reason: str
    count: int
    projects: list[str]
    newest_ids: list[int]
    last_at: datetime


def insert_rejections(connection: Connection, rejections: Sequence[Rejection]) -> None:
    """Add rows in one transaction of their own."""
    values = {
        "project_ids": [rejection.project_id for rejection in rejections],
        "received_at": [rejection.received_at for rejection in rejections],
        "protocols": [rejection.protocol for rejection in rejections],
        "reasons": [rejection.reason for rejection in rejections],
        "sizes": [rejection.size for rejection in rejections],
        "events": [rejection.event for rejection in rejections],
        "event_ids": [read_event_id(each.protocol, each.event) for each in rejections],
    }
    with connection.begin():
        connection.execute(_BEGIN_LIGHTLY)
        connection.execute(_INSERT, values)


def find_crowded_projects(connection: Connection, count: int) -> list[str]:
    """Return the projects with more than `count` rows. It reads the whole index."""
    return list(connection.scalars(_FIND_CROWDED, {"count": count}))


def delete_surplus(connection: Connection, project_id: str, count: int) -> int:
    """Delete a project's oldest rows until `count` are left, a thousand at the most.

    Returns how many, as `delete_expired`: where it is none, there are no more.
    """
    return _delete_some(connection, _DELETE_SURPLUS, {"project_id": project_id, "count": count})


def delete_expired(connection: Connection, cut: datetime) -> int:
    """Delete what was received before `cut`, a thousand rows at the most."""
    return _delete_some(connection, _DELETE_EXPIRED, {"cut": cut})


def _delete_some(connection: Connection, statement: TextClause, values: dict[str, object]) -> int:
    with connection.begin():
        connection.execute(_BEGIN_LIGHTLY)
        return connection.execute(statement, values | {"limit": _DELETED_AT_ONCE}).rowcount


def count_expired(connection: Connection, cut: datetime) -> int:
    """How many rows were received before `cut`."""
    return int(connection.scalar(_COUNT_EXPIRED, {"cut": cut}) or 0)


def list_rejections(
    connection: Connection, project_id: str | None, limit: int
) -> list[StoredRejection]:
    """Return the newest rows of a project, or of all, without the events themselves."""
    values = {"project_id": project_id, "limit": limit}
    return _make_rejections(connection.execute(_LIST, values).mappings())


def read_rejection(connection: Connection, rejection_id: int) -> StoredRejection | None:
    """One row, or None where there is none of this id."""
    found = _make_rejections(connection.execute(_READ, {"id": rejection_id}).mappings())
    return found[0] if found else None


def find_rejections(
    connection: Connection, event_id: str, project_id: str | None, limit: int = 100
) -> list[StoredRejection]:
    """Return the rows of events with this id, only a project's if one is given."""
    values = {"event_id": event_id, "project_id": project_id, "limit": limit}
    return _make_rejections(connection.execute(_FIND_BY_EVENT, values).mappings())


def group_newest_rejections(
    connection: Connection, newest: int, limit: int
) -> list[RejectionGroup]:
    """Return the newest rows grouped by their reasons, the largest groups first."""
    rows = connection.execute(_GROUP_NEWEST, {"newest": newest, "limit": limit}).mappings()
    return [RejectionGroup(**row) for row in rows]


def find_oldest_rejection(connection: Connection) -> datetime | None:
    """Return when the oldest row was received, or None if there is none."""
    oldest = connection.scalar(_FIND_OLDEST)
    assert oldest is None or isinstance(oldest, datetime)
    return oldest


def read_pages(
    connection: Connection, project_id: str | None, ids: Sequence[int]
) -> Iterator[list[StoredRejection]]:
    """Yield the rows that are there now, oldest first: those of a project and with these ids.

    None and an empty `ids` mean all. No transaction is open while a page is in use.
    """
    values = {"project_id": project_id, "ids": list(ids), "limit": _READ_AT_ONCE}
    yield from map(_make_rejections, read_in_pages(connection, _FIND_NEWEST, _READ_PAGE, values))


def settle_replayed(
    connection: Connection, accepted: Sequence[int], reasons: Mapping[int, str]
) -> None:
    """Delete the rows that were accepted, and note the reasons of those that were not."""
    ids = sorted([*accepted, *reasons])
    with connection.begin():
        connection.execute(_LOCK, {"ids": ids})
        connection.execute(_DELETE, {"ids": list(accepted)})
        values = {"ids": list(reasons), "reasons": list(reasons.values())}
        connection.execute(_SET_REASONS, values)


def delete_rejections(connection: Connection, ids: Sequence[int]) -> int:
    """Delete these rows in the connection's transaction; return how many were there."""
    connection.execute(_LOCK, {"ids": list(ids)})
    return connection.execute(_DELETE, {"ids": list(ids)}).rowcount


def _make_rejections(rows: Iterable[RowMapping]) -> list[StoredRejection]:
    return [StoredRejection(**{**row, "event": bytes(row["event"])}) for row in rows]
