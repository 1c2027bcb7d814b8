"""The outbox's tables, and all SQL on them.

`Outbox.statements_for` is for the transaction that stores the events; all else is for forwarding. A
delivery is what one provider still has to get of one payload: the events of one project that one
commit stored.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from uuid import UUID

from psycopg2.extensions import cursor as Cursor
from sqlalchemy import Connection, RowMapping, text

from server.events.copy_rows import Row
from server.events.encoded_events_pb2 import EncodedEvents
from server.storage.dead_events import bury_events

_MAX_PAYLOAD_EVENTS = 1000
_MAX_DELIVERIES = 1000
_READ_AT_ONCE = 64

# Most groups have one payload, for which two statements cost less than a common table expression.
_KEEP = """
INSERT INTO outbox_payloads (project_id, mapping_version, event_count, events)
VALUES (%s, %s, %s, %s);
INSERT INTO outbox_deliveries (payload_id, provider, event_count) VALUES {deliveries};
"""
_KEEP_DELIVERY = "(currval('outbox_payloads_id_seq'), %s, %s)"
# What a crash of the database forgets of claims and outcomes is done again: no commit of these has
# to wait for the disk, which ingestion needs.
_BEGIN_LIGHTLY = text("SET LOCAL synchronous_commit = off")
_FIND_DUE = text("""
SELECT id, payload_id, attempts, event_count, positions FROM outbox_deliveries
 WHERE provider = :provider AND due_at <= now()
 ORDER BY due_at, id LIMIT :limit FOR UPDATE SKIP LOCKED
""").execution_options(yield_per=_READ_AT_ONCE)
_LEASE = text("""
UPDATE outbox_deliveries
   SET lease = :lease, due_at = now() + make_interval(secs => :seconds) WHERE id = ANY(:ids)
""")
_READ_PAYLOADS = text("""
SELECT id, project_id, received_at, mapping_version, events FROM outbox_payloads
 WHERE id = ANY(:ids)
""")
_LOCK_OWNED = text("""
SELECT id FROM outbox_deliveries WHERE id = ANY(:ids) AND lease = :lease ORDER BY id FOR UPDATE
""")
_LOCK_PAYLOADS = text("SELECT id FROM outbox_payloads WHERE id = ANY(:ids) ORDER BY id FOR UPDATE")
_DELETE_DELIVERIES = text("DELETE FROM outbox_deliveries WHERE id = ANY(:ids)")
_DELETE_PAYLOADS = text("""
DELETE FROM outbox_payloads p WHERE p.id = ANY(:ids)
   AND NOT EXISTS (SELECT FROM outbox_deliveries d WHERE d.payload_id = p.id)
""")
_REQUEUE = text("""
INSERT INTO outbox_deliveries (payload_id, provider, attempts, event_count, positions, due_at)
VALUES (:payload_id, :provider, :attempts, :event_count, :positions,
        now() + make_interval(secs => :delay))
""")
_COUNT_DELIVERED = text("""
INSERT INTO forward_lanes (provider, delivered) VALUES (:provider, :count)
    ON CONFLICT (provider) DO UPDATE SET delivered = forward_lanes.delivered + :count
""")
_SET_STOPPED = text("""
INSERT INTO forward_lanes (provider, stopped_reason, stopped_at) VALUES (:provider, :reason, now())
    ON CONFLICT (provider) DO UPDATE
   SET stopped_reason = :reason, stopped_at = CASE WHEN CAST(:reason AS text) IS NULL THEN NULL
       ELSE coalesce(forward_lanes.stopped_at, now()) END
""")
_READ_STATUS = text("""
WITH pending AS (
    SELECT d.provider, sum(d.event_count) AS events, min(p.received_at) AS oldest_at
      FROM outbox_deliveries d JOIN outbox_payloads p ON p.id = d.payload_id GROUP BY 1
), dead AS (SELECT provider, count(*) AS events FROM dead_events GROUP BY 1)
SELECT provider, coalesce(pending.events, 0) AS pending, pending.oldest_at,
       coalesce(forward_lanes.delivered, 0) AS delivered, coalesce(dead.events, 0) AS dead,
       forward_lanes.stopped_reason
  FROM forward_lanes FULL JOIN pending USING (provider) FULL JOIN dead USING (provider)
 ORDER BY provider
""")


class Outbox:
    """Keeps newly stored events for the enabled providers."""

    def __init__(self, providers: Sequence[str], mapping_version: int) -> None:
        self._keep = _KEEP.format(deliveries=",".join([_KEEP_DELIVERY] * len(providers)))
        self._providers = providers
        self._mapping_version = mapping_version

    def statements_for(self, cursor: Cursor, rows: Sequence[Row]) -> bytes:
        """The statements that add rows, sorted by identity, to the outbox."""
        return b"".join(
            cursor.mogrify(self._keep, self._describe_payload(project, part))
            for project, group in groupby(rows, key=lambda row: row.project_id)
            for part in _split([row.encoded for row in group])
        )

    def _describe_payload(self, project: str, events: list[bytes]) -> list[object]:
        payload = EncodedEvents(events=events).SerializeToString()
        deliveries = [value for name in self._providers for value in (name, len(events))]
        return [project, self._mapping_version, len(events), payload, *deliveries]


def _split(events: list[bytes]) -> list[list[bytes]]:
    starts = range(0, len(events), _MAX_PAYLOAD_EVENTS)
    return [events[start : start + _MAX_PAYLOAD_EVENTS] for start in starts]


@dataclass(frozen=True)
class Delivery:
    """What one provider still has to get of one payload: encoded events, by their positions."""

    id: int
    payload_id: int
    attempts: int
    project_id: str
    received_at: datetime
    mapping_version: int
    events: Mapping[int, bytes]


@dataclass(frozen=True)
class Death:
    """Why an event will not be sent again, and what the provider said."""

    reason: str
    answer: str


@dataclass
class Outcome:
    """What became of a delivery's events, by position; what is in none of these is due at once."""

    delivery: Delivery
    done: set[int] = field(default_factory=set)
    dead: dict[int, Death] = field(default_factory=dict)
    delays: dict[int, float] = field(default_factory=dict)  # in seconds

    @property
    def attempts(self) -> int:
        """How often it has been tried to no avail, if this time was."""
        return self.delivery.attempts + 1

    def postpone(self, seconds: float) -> None:
        """Leaves all events for later."""
        self.delays = dict.fromkeys(self.delivery.events, seconds)

    @property
    def remaining(self) -> dict[int, float]:
        """The events that are to be sent again, and in how many seconds."""
        settled = self.done | self.dead.keys()
        return {p: self.delays.get(p, 0.0) for p in self.delivery.events if p not in settled}


def claim_batch(
    connection: Connection, provider: str, lease: UUID, seconds: float, max_events: int
) -> list[Delivery]:
    """Claims the longest due deliveries, about `max_events` events, for so many seconds.

    Others do not see them in that time, and see them again after it.
    """
    with connection.begin():
        connection.execute(_BEGIN_LIGHTLY)
        # Each has an event at the least, and may have a thousand: the cursor reads, and so locks,
        # few more of them than are taken.
        wanted = {"provider": provider, "limit": min(max_events, _MAX_DELIVERIES)}
        with connection.execute(_FIND_DUE, wanted) as found_due:
            due = _take_first(found_due.mappings(), max_events)
        ids = [row["id"] for row in due]
        connection.execute(_LEASE, {"lease": lease, "seconds": seconds, "ids": ids})
        found = connection.execute(_READ_PAYLOADS, {"ids": [row["payload_id"] for row in due]})
        payloads = {row["id"]: row for row in found.mappings()}
    return [_make_delivery(row, payloads[row["payload_id"]]) for row in due]


def _take_first(due: Iterable[RowMapping], max_events: int) -> list[RowMapping]:
    """The first deliveries up to so many events, one at the least."""
    taken: list[RowMapping] = []
    count = 0
    for row in due:
        count += row["event_count"]
        if taken and count > max_events:
            break
        taken.append(row)
    return taken


def _make_delivery(row: RowMapping, payload: RowMapping) -> Delivery:
    events = EncodedEvents.FromString(payload["events"]).events
    positions = range(len(events)) if row["positions"] is None else row["positions"]
    return Delivery(
        id=row["id"],
        payload_id=row["payload_id"],
        attempts=row["attempts"],
        project_id=payload["project_id"],
        received_at=payload["received_at"],
        mapping_version=payload["mapping_version"],
        events={position: events[position] for position in positions},
    )


def record_outcomes(
    connection: Connection, provider: str, lease: UUID, outcomes: Sequence[Outcome]
) -> None:
    """Records what became of claimed deliveries, all in one transaction.

    Those whose lease has passed to another forwarder are left to it. A payload goes with its last
    delivery.
    """
    by_id = {outcome.delivery.id: outcome for outcome in outcomes}
    with connection.begin():
        connection.execute(_BEGIN_LIGHTLY)
        owned = connection.scalars(_LOCK_OWNED, {"ids": list(by_id), "lease": lease}).all()
        settled = [by_id[delivery_id] for delivery_id in owned]
        payload_ids = sorted({outcome.delivery.payload_id for outcome in settled})
        # Lanes that end the same payload at once must see each other's deliveries go.
        connection.execute(_LOCK_PAYLOADS, {"ids": payload_ids})
        connection.execute(_DELETE_DELIVERIES, {"ids": list(owned)})
        if requeued := [row for o in settled for row in _requeued(o, provider)]:
            connection.execute(_REQUEUE, requeued)
        bury_events(connection, [row for o in settled for row in _buried(o, provider)])
        connection.execute(_DELETE_PAYLOADS, {"ids": payload_ids})
        delivered = sum(len(outcome.done) for outcome in settled)
        connection.execute(_COUNT_DELIVERED, {"provider": provider, "count": delivered})


def _requeued(outcome: Outcome, provider: str) -> Iterator[dict[str, object]]:
    """A delivery for each moment at which some of the events are to be sent again."""
    remaining = outcome.remaining
    for delay in sorted(set(remaining.values())):
        positions = sorted(p for p, seconds in remaining.items() if seconds == delay)
        yield {
            "payload_id": outcome.delivery.payload_id,
            "provider": provider,
            "attempts": outcome.attempts if delay else outcome.delivery.attempts,
            "event_count": len(positions),
            "positions": positions,
            "delay": delay,
        }


def _buried(outcome: Outcome, provider: str) -> Iterator[dict[str, object]]:
    for position, death in outcome.dead.items():
        yield {
            "provider": provider,
            "project_id": outcome.delivery.project_id,
            "reason": death.reason,
            "answer": death.answer,
            "mapping_version": outcome.delivery.mapping_version,
            "event": outcome.delivery.events[position],
            "received_at": outcome.delivery.received_at,
        }


def set_stopped(connection: Connection, provider: str, reason: str | None) -> None:
    """Notes why a lane is stopped, or with None that it is not."""
    with connection.begin():
        connection.execute(_SET_STOPPED, {"provider": provider, "reason": reason})


@dataclass(frozen=True)
class LaneStatus:
    """How forwarding to one provider stands; counts are of events."""

    provider: str
    pending: int
    oldest_at: datetime | None
    delivered: int
    dead: int
    stopped_reason: str | None


def read_status(connection: Connection) -> list[LaneStatus]:
    """The lanes that have, or had, anything to do, by their providers' names."""
    rows = connection.execute(_READ_STATUS).mappings()
    return [LaneStatus(**row) for row in rows]
