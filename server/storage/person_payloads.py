"""A person's events in the outbox: found, and taken out of the payloads that hold others' too."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from google.protobuf.message import DecodeError
from sqlalchemy import Connection, text

from server.events.encoded_events_pb2 import EncodedEvents

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


def read_payloads(connection: Connection, project_id: str) -> Iterator[tuple[int, datetime, bytes]]:
    """Yield the payloads of a project that wait now, the oldest first, with their bytes.

    No transaction is open while one is in use.
    """
    with connection.begin():
        newest = connection.scalar(_FIND_NEWEST)
    values = {"project_id": project_id, "newest": newest, "limit": _READ_AT_ONCE}
    after = 0
    while True:
        with connection.begin():
            page = connection.execute(_READ_PAGE, values | {"after": after}).all()
        if not page:
            return
        for payload_id, received_at, events in page:
            yield payload_id, received_at, bytes(events)
        after = page[-1].id


def split_payload(events: bytes) -> Sequence[bytes] | None:
    """Return the encoded events of a payload, or None if it is unreadable."""
    try:
        return EncodedEvents.FromString(events).events
    except DecodeError:
        return None


def find_waiting(
    connection: Connection, payload_id: int
) -> list[tuple[str, frozenset[int] | None]]:
    """Return the providers that a payload waits for, and the positions of which; None is all."""
    with connection.begin():
        rows = connection.execute(_READ_DELIVERIES, {"id": payload_id}).all()
    return [(name, None if places is None else frozenset(places)) for name, places in rows]
