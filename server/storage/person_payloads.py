"""A person's events in the outbox: found, and taken out of the payloads that hold others' too."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from google.protobuf.message import DecodeError
from sqlalchemy import Connection, RowMapping, text

from server.events.encoded_events_pb2 import EncodedEvents
from server.storage.pages import read_in_pages

# A payload may have 4 MB.
_READ_AT_ONCE = 16

_FIND_NEWEST = text("SELECT coalesce(max(id), 0) FROM outbox_payloads")
_READ_PAGE = text("""
SELECT id, received_at, events FROM outbox_payloads
 WHERE project_id = :project_id AND id > :after AND id <= :newest ORDER BY id LIMIT :limit
""")
_READ_DELIVERIES = text("""
SELECT provider, positions FROM outbox_deliveries WHERE payload_id = :id ORDER BY provider
""")
# A delivery that is locked is being claimed or recorded.
_LOCK_PAYLOAD = text("SELECT events FROM outbox_payloads WHERE id = :id FOR UPDATE")
_LOCK_DELIVERIES = text("""
SELECT id, positions, lease IS NOT NULL AND due_at > now() AS is_leased FROM outbox_deliveries
 WHERE payload_id = :id ORDER BY id FOR UPDATE SKIP LOCKED
""")
_COUNT_DELIVERIES = text("SELECT count(*) FROM outbox_deliveries WHERE payload_id = :id")
_SET_EVENTS = text("""
UPDATE outbox_payloads SET events = :events, event_count = :count WHERE id = :id
""")
_POINT = text("""
UPDATE outbox_deliveries
   SET positions = CAST(:positions AS integer[]), event_count = :count, lease = NULL
 WHERE id = :id
""")
_DELETE_DELIVERY = text("DELETE FROM outbox_deliveries WHERE id = :id")
_DELETE_UNWANTED = text("""
DELETE FROM outbox_payloads p WHERE p.id = :id
   AND NOT EXISTS (SELECT FROM outbox_deliveries d WHERE d.payload_id = p.id)
""")


def read_payloads(connection: Connection, project_id: str) -> Iterator[tuple[int, datetime, bytes]]:
    """Yield the payloads of a project that wait now, the oldest first, with their bytes.

    No transaction is open while one is in use.
    """
    values = {"project_id": project_id, "limit": _READ_AT_ONCE}
    for page in read_in_pages(connection, _FIND_NEWEST, _READ_PAGE, values):
        for row in page:
            yield row["id"], row["received_at"], bytes(row["events"])


def split_payload(events: bytes) -> Sequence[bytes] | None:
    """Return the encoded events of a payload, or None if it is unreadable."""
    try:
        return EncodedEvents.FromString(events).events
    except DecodeError:
        return None


def find_waiting(
    connection: Connection, payload_id: int
) -> list[tuple[str, frozenset[int] | None]]:
    """Return the providers that still need a payload, with the positions; None means all."""
    with connection.begin():
        rows = connection.execute(_READ_DELIVERIES, {"id": payload_id}).all()
    return [(name, None if places is None else frozenset(places)) for name, places in rows]


def rewrite_payload(
    connection: Connection, payload_id: int, is_kept: Callable[[bytes], bool]
) -> int | None:
    """Take events out of a payload, for every delivery of it; return how many.

    None means that some of it is being sent: nothing is changed, and it is to be tried again. Runs
    in the connection's transaction. The positions and counts of the deliveries change with the
    payload, and a lease that has ended is void: its holder knows only the old positions.
    """
    # The payload comes first, and nothing is waited for behind it: whoever records an outcome locks
    # deliveries, then the payload, and only then adds new deliveries.
    payload = connection.scalar(_LOCK_PAYLOAD, {"id": payload_id})
    if payload is None:
        return 0
    deliveries = connection.execute(_LOCK_DELIVERIES, {"id": payload_id}).mappings().all()
    count = connection.scalar(_COUNT_DELIVERIES, {"id": payload_id})
    if count != len(deliveries) or any(each["is_leased"] for each in deliveries):
        return None
    events = EncodedEvents.FromString(payload).events
    kept = [position for position, event in enumerate(events) if is_kept(event)]
    if len(kept) < len(events):
        _keep_only(connection, payload_id, kept, [events[position] for position in kept])
        _point_at(connection, deliveries, kept)
        connection.execute(_DELETE_UNWANTED, {"id": payload_id})
    return len(events) - len(kept)


def _keep_only(
    connection: Connection, payload_id: int, kept: Sequence[int], events: Sequence[bytes]
) -> None:
    encoded = EncodedEvents(events=events).SerializeToString()
    values = {"id": payload_id, "count": len(kept), "events": encoded}
    connection.execute(_SET_EVENTS, values)


def _point_at(
    connection: Connection, deliveries: Sequence[RowMapping], kept: Sequence[int]
) -> None:
    """Point deliveries at the new positions of the events that are kept."""
    new_places = {old: new for new, old in enumerate(kept)}
    for delivery in deliveries:
        old = delivery["positions"]
        positions = None if old is None else [new_places[p] for p in old if p in new_places]
        count = len(kept) if positions is None else len(positions)
        values = {"id": delivery["id"], "positions": positions, "count": count}
        connection.execute(_POINT if count else _DELETE_DELIVERY, values)
