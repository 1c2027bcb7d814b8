"""The outbox's tables, and all SQL on them.

`Outbox.statements_for` is for the transaction that stores the events; everything else is for
forwarding. A delivery is what one provider must still get of one payload: the events of one project
that one commit stored.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from heapq import heapify, heappop, heappush
from itertools import groupby
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from psycopg2.extensions import cursor as Cursor
from sqlalchemy import Connection, RowMapping, text

from server.events.copy_rows import Row
from server.events.encoded_events_pb2 import EncodedEvents
from server.storage.dead_events import bury_events

# A payload is claimed as a whole: one that is small leaves room for others in a claim.
_MAX_PAYLOAD_EVENTS = 1000
_MAX_PAYLOAD_BYTES = 4 << 20
_MAX_DELIVERIES = 1000
# Projects among which one claim is divided; the next claim begins after them.
_MAX_PROJECTS = 50
# Another forwarder may have leased first what was found: then there may be more behind it.
_CLAIM_TRIES = 3
# For so long nobody else sees what is being buried.
_BURIAL_SECONDS = 60.0

# Most groups have one payload, for which two statements cost less than a common table expression.
_KEEP = """
INSERT INTO outbox_payloads (project_id, mapping_version, event_count, events)
VALUES (%s, %s, %s, %s);
INSERT INTO outbox_deliveries (payload_id, provider, project_id, event_count) VALUES {deliveries};
"""
_KEEP_DELIVERY = "(currval('outbox_payloads_id_seq'), %s, %s, %s)"
# What a crash of the database forgets of claims and outcomes is done again: no commit of these has
# to wait for the disk, which ingestion needs.
BEGIN_LIGHTLY = text("SET LOCAL synchronous_commit = off")
# An idle lane asks only this.
_FIND_ANY = text("""
SELECT 1 FROM outbox_deliveries WHERE provider = :provider AND due_at <= now() LIMIT 1
""")
# From one project to the next along the index, however many deliveries each of them has.
_FIND_PROJECTS = text("""
WITH RECURSIVE projects AS (
    (SELECT project_id FROM outbox_deliveries
      WHERE provider = :provider AND (:is_first OR project_id > :after)
      ORDER BY project_id LIMIT 1)
  UNION ALL
    SELECT (SELECT d.project_id FROM outbox_deliveries d
             WHERE d.provider = :provider AND d.project_id > projects.project_id
             ORDER BY d.project_id LIMIT 1)
      FROM projects WHERE projects.project_id IS NOT NULL
)
SELECT project_id FROM projects WHERE EXISTS (
    SELECT FROM outbox_deliveries d WHERE d.provider = :provider
       AND d.project_id = projects.project_id AND d.due_at <= now()
) LIMIT :limit
""")
# The size of a payload is read without the payload, and by its key: a join might read them all.
_FIND_DUE = text("""
SELECT d.id, d.project_id, d.event_count,
       (SELECT octet_length(p.events) FROM outbox_payloads p WHERE p.id = d.payload_id) AS size
  FROM unnest(CAST(:projects AS text[])) WITH ORDINALITY AS turn (project_id, number)
 CROSS JOIN LATERAL (
    SELECT *, sum(event_count) OVER (ORDER BY due_at, id) - event_count AS before FROM (
        SELECT id, payload_id, project_id, event_count, due_at FROM outbox_deliveries
         WHERE provider = :provider AND project_id = turn.project_id AND due_at <= now()
         ORDER BY due_at, id LIMIT :limit
    ) due
 ) d
 WHERE d.before < :max_events
 ORDER BY turn.number, d.due_at, d.id
""")
_FIND_EXPIRED = text("""
SELECT d.id, d.project_id, d.event_count, octet_length(p.events) AS size
  FROM outbox_payloads p JOIN outbox_deliveries d ON d.payload_id = p.id
 WHERE d.provider = :provider AND d.due_at <= now() AND coalesce(p.retried_at, p.received_at) < :cut
 ORDER BY p.id, d.id LIMIT :limit
""")
_LEASE = text("""
UPDATE outbox_deliveries SET lease = :lease, due_at = now() + make_interval(secs => :seconds)
 WHERE id = ANY (ARRAY(
    SELECT id FROM outbox_deliveries WHERE id = ANY(:ids) AND due_at <= now()
     ORDER BY id FOR UPDATE SKIP LOCKED
 )) RETURNING id, payload_id, attempts, positions
""")
_READ_PAYLOADS = text("""
SELECT id, project_id, received_at, coalesce(retried_at, received_at) AS queued_at,
       mapping_version, events FROM outbox_payloads
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
INSERT INTO outbox_deliveries
       (payload_id, provider, project_id, attempts, event_count, positions, due_at)
VALUES (:payload_id, :provider, :project_id, :attempts, :event_count, :positions,
        now() + make_interval(secs => :delay))
""")
_COUNT_DELIVERED = text("""
INSERT INTO forward_lanes (provider, delivered, seen_at) VALUES (:provider, :count, now())
    ON CONFLICT (provider)
    DO UPDATE SET delivered = forward_lanes.delivered + :count, seen_at = excluded.seen_at
""")
_COUNT_WAITING = text("""
SELECT coalesce(sum(event_count), 0) FROM outbox_deliveries WHERE provider = :provider
""")
_PURGE = text("""
DELETE FROM outbox_deliveries WHERE id = ANY (ARRAY(
    SELECT id FROM outbox_deliveries WHERE provider = :provider ORDER BY id LIMIT :limit FOR UPDATE
)) RETURNING payload_id, event_count
""")
_NOTE_PURGED = text("""
INSERT INTO forward_history AS known (provider, purged_until)
SELECT :provider, max(received_at) FROM outbox_payloads WHERE id = ANY(:ids)
    ON CONFLICT (provider) DO UPDATE
   SET purged_until = greatest(known.purged_until, excluded.purged_until)
""")


class Outbox:
    """Keeps newly stored events for the enabled providers."""

    def __init__(self, providers: Sequence[str], mapping_version: int) -> None:
        self._keep = _KEEP.format(deliveries=",".join([_KEEP_DELIVERY] * len(providers)))
        self._providers = providers
        self._mapping_version = mapping_version

    def statements_for(self, cursor: Cursor, rows: Sequence[Row]) -> bytes:
        """Return the statements that add rows, sorted by identity, to the outbox."""
        return b"".join(
            cursor.mogrify(self._keep, self._describe_payload(project, part))
            for project, group in groupby(rows, key=lambda row: row.project_id)
            for part in _split([row.encoded for row in group])
        )

    def _describe_payload(self, project: str, events: list[bytes]) -> list[object]:
        payload = EncodedEvents(events=events).SerializeToString()
        deliveries = [value for name in self._providers for value in (name, project, len(events))]
        return [project, self._mapping_version, len(events), payload, *deliveries]


def _split(events: list[bytes]) -> Iterator[list[bytes]]:
    """Cut the events of a commit into payloads within the limits."""
    if len(events) <= _MAX_PAYLOAD_EVENTS and sum(map(len, events)) <= _MAX_PAYLOAD_BYTES:
        yield events
        return
    part: list[bytes] = []
    size = 0
    for event in events:
        size += len(event)
        if part and (len(part) == _MAX_PAYLOAD_EVENTS or size > _MAX_PAYLOAD_BYTES):
            yield part
            part, size = [], len(event)
        part.append(event)
    yield part


@dataclass(frozen=True)
class Delivery:
    """What one provider must still get of one payload: encoded events, by their positions."""

    id: int
    payload_id: int
    attempts: int
    project_id: str
    received_at: datetime
    # Later than that if it was dead and is retried.
    queued_at: datetime
    mapping_version: int
    events: Mapping[int, bytes]


@dataclass(frozen=True)
class Death:
    """Why an event will not be sent again, and what the provider answered."""

    reason: str
    answer: str


@dataclass
class Outcome:
    """What became of a delivery's events, by position; those in none of these are due at once."""

    delivery: Delivery
    done: set[int] = field(default_factory=set)
    dead: dict[int, Death] = field(default_factory=dict)
    delays: dict[int, float] = field(default_factory=dict)  # in seconds

    @property
    def attempts(self) -> int:
        """How often sending has failed, if it fails this time."""
        return self.delivery.attempts + 1

    def postpone(self, seconds: float) -> None:
        """Leave all events for later."""
        self.delays = dict.fromkeys(self.delivery.events, seconds)

    def bury(self, death: Death) -> None:
        """Give up all events."""
        self.dead = dict.fromkeys(self.delivery.events, death)

    @property
    def remaining(self) -> dict[int, float]:
        """The events that are to be sent again, and in how many seconds."""
        settled = self.done | self.dead.keys()
        return {p: self.delays.get(p, 0.0) for p in self.delivery.events if p not in settled}


class Lease(NamedTuple):
    """For how many seconds nobody else sees what is claimed, and who may record outcomes."""

    id: UUID
    seconds: float


class ClaimLimits(NamedTuple):
    """How much a claim takes: events, and bytes of the payloads that hold them."""

    events: int
    bytes: int


def claim_batch(
    connection: Connection,
    provider: str,
    lease: Lease,
    limits: ClaimLimits,
    after: str | None = None,
) -> list[Delivery]:
    """Claim what is due, at least one delivery if there is any, for the time of the lease.

    Each project gives what has been due longest. The projects take turns, beginning with the first
    one after `after`. When the lease ends, others may claim what is not recorded.
    """
    for _ in range(_CLAIM_TRIES):
        with connection.begin():
            connection.execute(BEGIN_LIGHTLY)
            found = _find_due(connection, provider, limits.events, after)
            deliveries = _lease(connection, lease, take_turns(found, limits))
        if deliveries or not found:
            break
    return deliveries


def _find_due(
    connection: Connection, provider: str, max_events: int, after: str | None
) -> Sequence[RowMapping]:
    if connection.scalar(_FIND_ANY, {"provider": provider}) is None:
        return []
    projects = _find_projects(connection, provider, after)
    if after is not None and len(projects) < _MAX_PROJECTS:
        # Once around, without taking a project twice.
        first = _find_projects(connection, provider, None)
        projects = list(dict.fromkeys([*projects, *first]))[:_MAX_PROJECTS]
    wanted = {"provider": provider, "projects": projects, "max_events": max_events}
    limit = max(1, _MAX_DELIVERIES // max(1, len(projects)))
    return connection.execute(_FIND_DUE, {**wanted, "limit": limit}).mappings().all()


def _find_projects(connection: Connection, provider: str, after: str | None) -> list[str]:
    place = {"provider": provider, "is_first": after is None, "after": after or ""}
    return list(connection.scalars(_FIND_PROJECTS, {**place, "limit": _MAX_PROJECTS}))


def take_turns(found: Sequence[RowMapping], limits: ClaimLimits) -> list[int]:
    """Choose deliveries within the limits, the next always of the project that has fewest events.

    `found` has the deliveries of each project in their order; one is chosen at least.
    """
    waiting: dict[str, deque[RowMapping]] = defaultdict(deque)
    for row in found:
        waiting[row["project_id"]].append(row)
    turns = [(0, number, project) for number, project in enumerate(waiting)]
    heapify(turns)
    chosen: list[int] = []
    events = size = 0
    while turns:
        taken, number, project = heappop(turns)
        row = waiting[project].popleft()
        events, size = events + row["event_count"], size + row["size"]
        if chosen and (events > limits.events or size > limits.bytes):
            break
        chosen.append(row["id"])
        if waiting[project]:
            heappush(turns, (taken + row["event_count"], number, project))
    return chosen


def _lease(connection: Connection, lease: Lease, ids: Sequence[int]) -> list[Delivery]:
    """Lease those of the deliveries that are still to be had, and read them."""
    if not ids:
        return []
    wanted = {"lease": lease.id, "seconds": lease.seconds, "ids": ids}
    leased = {row["id"]: row for row in connection.execute(_LEASE, wanted).mappings()}
    ids_of_payloads = [row["payload_id"] for row in leased.values()]
    read = connection.execute(_READ_PAYLOADS, {"ids": ids_of_payloads}).mappings()
    payloads = {row["id"]: row for row in read}
    rows = [leased[delivery_id] for delivery_id in ids if delivery_id in leased]
    return [_make_delivery(row, payloads[row["payload_id"]]) for row in rows]


def _make_delivery(row: RowMapping, payload: RowMapping) -> Delivery:
    events = EncodedEvents.FromString(payload["events"]).events
    positions = range(len(events)) if row["positions"] is None else row["positions"]
    return Delivery(
        id=row["id"],
        payload_id=row["payload_id"],
        attempts=row["attempts"],
        project_id=payload["project_id"],
        received_at=payload["received_at"],
        queued_at=payload["queued_at"],
        mapping_version=payload["mapping_version"],
        events={position: events[position] for position in positions},
    )


def record_outcomes(
    connection: Connection, provider: str, lease: UUID, outcomes: Sequence[Outcome]
) -> None:
    """Record what became of claimed deliveries, all in one transaction.

    Those whose lease has passed to another forwarder are left to it. A payload goes with its last
    delivery.
    """
    by_id = {outcome.delivery.id: outcome for outcome in outcomes}
    with connection.begin():
        connection.execute(BEGIN_LIGHTLY)
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


def bury_expired(
    connection: Connection, provider: str, limits: ClaimLimits, cut: datetime, death: Death
) -> int:
    """Bury events that are due and were received before `cut`; return their number.

    0 means that none are left.
    """
    lease = Lease(uuid4(), _BURIAL_SECONDS)
    with connection.begin():
        connection.execute(BEGIN_LIGHTLY)
        wanted = {"provider": provider, "cut": cut, "limit": _MAX_DELIVERIES}
        found = connection.execute(_FIND_EXPIRED, wanted).mappings().all()
        deliveries = _lease(connection, lease, take_turns(found, limits))
    outcomes = [Outcome(delivery) for delivery in deliveries]
    for outcome in outcomes:
        outcome.bury(death)
    if outcomes:
        record_outcomes(connection, provider, lease.id, outcomes)
    return sum(len(delivery.events) for delivery in deliveries)


def _requeued(outcome: Outcome, provider: str) -> Iterator[dict[str, object]]:
    """Yield a delivery for each moment at which some of the events are to be sent again."""
    remaining = outcome.remaining
    for delay in sorted(set(remaining.values())):
        positions = sorted(p for p, seconds in remaining.items() if seconds == delay)
        yield {
            "payload_id": outcome.delivery.payload_id,
            "provider": provider,
            "project_id": outcome.delivery.project_id,
            "attempts": outcome.attempts if delay else outcome.delivery.attempts,
            "event_count": len(positions),
            "positions": positions,
            "delay": delay,
        }


def _buried(outcome: Outcome, provider: str) -> Iterator[dict[str, Any]]:
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


def count_waiting(connection: Connection, provider: str) -> int:
    """Count the events that wait for a provider."""
    return int(connection.scalar(_COUNT_WAITING, {"provider": provider}) or 0)


def purge_waiting(connection: Connection, provider: str) -> int | None:
    """Delete at most a thousand deliveries to a provider, and return the number of their events.

    None means that none are left.
    """
    with connection.begin():
        wanted = {"provider": provider, "limit": _MAX_DELIVERIES}
        purged = connection.execute(_PURGE, wanted).mappings().all()
        payload_ids = sorted({row["payload_id"] for row in purged})
        connection.execute(_LOCK_PAYLOADS, {"ids": payload_ids})
        connection.execute(_NOTE_PURGED, {"provider": provider, "ids": payload_ids})
        connection.execute(_DELETE_PAYLOADS, {"ids": payload_ids})
    return sum(row["event_count"] for row in purged) if purged else None
