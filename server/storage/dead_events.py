"""The dead events' table, and all SQL on it: events that a provider will never get.

A dead event keeps its encoded bytes, the reason and the provider's last answer. It can be put back
into the outbox, or purged.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, CursorResult, RowMapping, text

from server.events.encoded_events_pb2 import EncodedEvents
from server.events.event_ids import read_event_id
from server.protocols import GRPC
from server.storage.pages import read_in_pages

_DELETED_AT_ONCE = 1000
_READ_AT_ONCE = 200

_BURY = text("""
INSERT INTO dead_events
       (provider, project_id, reason, answer, mapping_version, event, received_at, event_id)
VALUES (:provider, :project_id, :reason, :answer, :mapping_version, :event, :received_at, :event_id)
""")
_LIST = text("""
SELECT id, provider, project_id, reason, answer, event, died_at FROM dead_events
 WHERE CAST(:provider AS text) IS NULL OR provider = :provider ORDER BY id DESC LIMIT :limit
""")
_FIND = text("""
SELECT id, provider, project_id, reason, answer, event, died_at FROM dead_events
 WHERE id = ANY(:ids) AND (CAST(:provider AS text) IS NULL OR provider = :provider)
""")
_FIND_BY_EVENT = text("""
SELECT id, provider, project_id, reason, answer, event, died_at FROM dead_events
 WHERE event_id = :event_id AND project_id = :project_id ORDER BY id
""")
_FIND_NEWEST = text("SELECT coalesce(max(id), 0) FROM dead_events")
_READ_PAGE = text("""
SELECT id, provider, project_id, reason, answer, event, died_at FROM dead_events
 WHERE project_id = :project_id AND id > :after AND id <= :newest ORDER BY id LIMIT :limit
""")
_LOCK = text("SELECT id FROM dead_events WHERE id = ANY(:ids) ORDER BY id FOR UPDATE")
_DELETE_THESE = text("DELETE FROM dead_events WHERE id = ANY(:ids)")
_FIND_TEXTS = text("""
SELECT id, reason, answer FROM dead_events WHERE EXISTS (
    SELECT FROM unnest(CAST(:texts AS text[])) AS wanted
     WHERE strpos(answer, wanted) > 0 OR strpos(reason, wanted) > 0
) ORDER BY id
""")
_SET_TEXTS = text("UPDATE dead_events SET reason = :reason, answer = :answer WHERE id = :id")
_DELETE = """
DELETE FROM dead_events
 WHERE (CAST(:provider AS text) IS NULL OR provider = :provider)
   AND (cardinality(CAST(:ids AS bigint[])) = 0 OR id = ANY(:ids))
"""
# Notes that what was received until then may have been purged.
_NOTE_PURGED = """
INSERT INTO forward_history AS known (provider, purged_until)
SELECT provider, max(received_at) FROM purged GROUP BY provider
    ON CONFLICT (provider) DO UPDATE
   SET purged_until = greatest(known.purged_until, excluded.purged_until)
"""
_PURGE = text(f"""
WITH purged AS ({_DELETE} RETURNING provider, received_at), noted AS ({_NOTE_PURGED})
SELECT count(*) FROM purged
""")  # noqa: S608 - both are constants
_TAKE = text(f"{_DELETE} RETURNING provider, project_id, mapping_version, event, received_at")
_REVIVE = text("""
WITH kept AS (
    INSERT INTO outbox_payloads
           (project_id, mapping_version, event_count, events, received_at, retried_at)
    VALUES (:project_id, :mapping_version, 1, :events, :received_at, now()) RETURNING id
) INSERT INTO outbox_deliveries (payload_id, provider, project_id, event_count)
  SELECT id, :provider, :project_id, 1 FROM kept
""")
_COUNT_OLD = text("SELECT count(*) FROM dead_events WHERE received_at < :cut")
_DELETE_OLD = text(f"""
WITH purged AS (
    DELETE FROM dead_events WHERE id = ANY (ARRAY(
        SELECT id FROM dead_events WHERE received_at < :cut
         ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
    )) RETURNING provider, received_at
), noted AS ({_NOTE_PURGED}) SELECT count(*) FROM purged
""")  # noqa: S608 - as above


@dataclass(frozen=True)
class DeadEvent:
    """An event that a provider refused for good, or could not be given in time."""

    id: int
    provider: str
    project_id: str
    reason: str
    answer: str
    event: bytes
    died_at: datetime


def bury_events(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Add dead events, given by the names of their columns, in the connection's transaction."""
    if rows:
        connection.execute(_BURY, [row | {"event_id": _read_id(row["event"])} for row in rows])


def _read_id(event: bytes) -> str | None:
    return read_event_id(GRPC, event)  # whichever way it came, it is kept as protobuf


def list_dead(connection: Connection, provider: str | None, limit: int) -> list[DeadEvent]:
    """Return the newest dead events of a provider, or of all if it is None."""
    return _read_dead(connection.execute(_LIST, {"provider": provider, "limit": limit}))


def find_dead(
    connection: Connection, ids: Sequence[int], provider: str | None = None
) -> list[DeadEvent]:
    """Return the dead events with these ids, only a provider's if one is given."""
    return _read_dead(connection.execute(_FIND, {"provider": provider, "ids": list(ids)}))


def find_dead_event(connection: Connection, project_id: str, event_id: str) -> list[DeadEvent]:
    """Return the dead events of a project with this id."""
    wanted = {"project_id": project_id, "event_id": event_id}
    return _read_dead(connection.execute(_FIND_BY_EVENT, wanted))


def read_dead_pages(connection: Connection, project_id: str) -> Iterator[list[DeadEvent]]:
    """Yield the dead events of a project that are there now, oldest first.

    No transaction is open while a page is in use.
    """
    values = {"project_id": project_id, "limit": _READ_AT_ONCE}
    yield from map(_make_dead, read_in_pages(connection, _FIND_NEWEST, _READ_PAGE, values))


def _read_dead(rows: CursorResult[Any]) -> list[DeadEvent]:
    return _make_dead(rows.mappings())


def _make_dead(rows: Iterable[RowMapping]) -> list[DeadEvent]:
    return [DeadEvent(**{**row, "event": bytes(row["event"])}) for row in rows]


def retry_dead(
    connection: Connection,
    provider: str | None,
    ids: Sequence[int],
    is_dropped: Callable[[str, bytes], bool] = lambda _project_id, _event: False,
) -> int:
    """Put dead events back into the outbox, all if `ids` is empty, and return their number.

    Those for which `is_dropped(project_id, event)` is true are deleted instead. Runs in the
    connection's transaction, as `purge_dead` does.
    """
    chosen = {"provider": provider, "ids": list(ids)}
    taken = connection.execute(_TAKE, chosen).mappings().all()
    revived = [row for row in taken if not is_dropped(row["project_id"], bytes(row["event"]))]
    for row in revived:
        events = EncodedEvents(events=[bytes(row["event"])]).SerializeToString()
        connection.execute(_REVIVE, {**row, "events": events})
    return len(revived)


def purge_dead(connection: Connection, provider: str | None, ids: Sequence[int]) -> int:
    """Delete dead events, all if `ids` is empty, and return their number."""
    return int(connection.scalar(_PURGE, {"provider": provider, "ids": list(ids)}) or 0)


def delete_dead(connection: Connection, ids: Sequence[int]) -> int:
    """Delete these dead events, and keep nothing of their fate; return their number.

    Runs in the connection's transaction.
    """
    connection.execute(_LOCK, {"ids": list(ids)})
    return connection.execute(_DELETE_THESE, {"ids": list(ids)}).rowcount


def change_texts(connection: Connection, texts: Sequence[str], change: Callable[[str], str]) -> int:
    """Change reasons and answers that contain one of these texts; return in how many events.

    Runs in the connection's transaction.
    """
    found = connection.execute(_FIND_TEXTS, {"texts": list(texts)}).mappings().all()
    for row in found:
        changed = {name: change(row[name]) for name in ("reason", "answer")}
        connection.execute(_SET_TEXTS, {"id": row["id"], **changed})
    return len(found)


def count_old_dead(connection: Connection, cut: datetime) -> int:
    """Count the dead events that were received before `cut`."""
    return int(connection.scalar(_COUNT_OLD, {"cut": cut}) or 0)


def delete_old_dead(connection: Connection, cut: datetime) -> int:
    """Delete at most a thousand dead events received before `cut`, and return their number.

    0 means that none are left.
    """
    with connection.begin():
        return int(connection.scalar(_DELETE_OLD, {"cut": cut, "limit": _DELETED_AT_ONCE}) or 0)
