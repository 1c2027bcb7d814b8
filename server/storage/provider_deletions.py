"""The deletions of persons that analytics providers are asked for, and all SQL on their table.

The ids are in a row only until its provider has taken the deletion, and sealed.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import Connection, text

from server.storage.outbox import BEGIN_LIGHTLY, Lease

# The provider has not taken it; has taken it; has done it; has failed to do it; deletes nobody by
# such ids; knows nobody by these ids.
WAITING, ACCEPTED, DONE = "waiting", "accepted", "done"
FAILED, IMPOSSIBLE, UNKNOWN = "failed", "impossible", "unknown"

_ADD = text("""
INSERT INTO provider_deletions (receipt_id, provider, sealed)
SELECT :receipt_id, provider, sealed
  FROM unnest((SELECT providers FROM person_deletions WHERE id = :receipt_id)) provider
 CROSS JOIN unnest(CAST(:sealed AS bytea[])) WITH ORDINALITY AS part (sealed, number)
 ORDER BY number
""")
# What was sealed under another secret nobody can read.
_FIND_DUE = text("""
SELECT d.id FROM provider_deletions d JOIN person_deletions r ON r.id = d.receipt_id
 WHERE d.provider = :provider AND d.due_at <= now()
   AND (d.sealed IS NULL OR r.secret_mark = :secret_mark)
 ORDER BY d.due_at, d.id LIMIT 1
""")
# Citus lets a statement that writes a column call no function of the moment beside it.
_NOW = text("SELECT now()")
_TAKE_TURN = text("""
INSERT INTO forward_lanes AS lane (provider, deletions_after)
VALUES (:provider, CAST(:now AS timestamptz) + make_interval(secs => :pause))
    ON CONFLICT (provider) DO UPDATE SET deletions_after = excluded.deletions_after
 WHERE lane.deletions_after IS NULL OR lane.deletions_after <= CAST(:now AS timestamptz)
RETURNING deletion_failures
""")
_LEASE = text("""
UPDATE provider_deletions SET lease = :lease, due_at = now() + make_interval(secs => :seconds)
 WHERE id = (SELECT id FROM provider_deletions
              WHERE id = :id AND due_at <= now() FOR UPDATE SKIP LOCKED)
RETURNING id, receipt_id, sealed, job, requested_at, accepted_at
""")
_RECORD = text("""
UPDATE provider_deletions SET
    state = :state, detail = coalesce(:detail, detail), job = coalesce(:job, job), lease = NULL,
    sealed = CASE WHEN :state = 'waiting' THEN sealed END,
    accepted_at = CASE WHEN :state = 'accepted' AND accepted_at IS NULL
                       THEN CAST(:now AS timestamptz) ELSE accepted_at END,
    ended_at = CASE WHEN CAST(:seconds AS float) IS NULL THEN CAST(:now AS timestamptz) END,
    due_at = CAST(:now AS timestamptz) + make_interval(secs => :seconds),
    attempts = CASE WHEN CAST(:error AS text) IS NULL THEN 0 ELSE attempts + 1 END,
    last_error = :error,
    last_error_at = CASE WHEN CAST(:error AS text) IS NOT NULL THEN CAST(:now AS timestamptz) END
 WHERE id = :id AND lease = :lease
""")
_NOTE_SUCCESS = text("UPDATE forward_lanes SET deletion_failures = 0 WHERE provider = :provider")
_NOTE_FAILURE = text("""
UPDATE forward_lanes SET deletion_failures = deletion_failures + 1,
       deletions_after = greatest(
           deletions_after, CAST(:now AS timestamptz) + make_interval(secs => :pause))
 WHERE provider = :provider
""")
_READ = text("""
SELECT d.receipt_id, d.provider, d.state, d.detail, d.job, d.requested_at, d.accepted_at,
       d.ended_at, d.attempts, d.last_error, d.last_error_at,
       CASE WHEN d.due_at IS NOT NULL THEN greatest(d.due_at, lane.deletions_after) END
           AS next_try_at
  FROM provider_deletions d LEFT JOIN forward_lanes lane USING (provider)
 WHERE d.receipt_id = ANY(CAST(:receipt_ids AS bigint[])) ORDER BY d.id
""")


@dataclass(frozen=True)
class ClaimedDeletion:
    """A deletion that a lane deals with; `failures` is how often the provider has failed in a row.

    Its ids are `sealed` as long as the provider has not taken it; later it is the provider's `job`.
    """

    id: int
    receipt_id: int
    sealed: bytes | None
    job: str | None
    requested_at: datetime
    accepted_at: datetime | None
    now: datetime
    failures: int


class Progress(NamedTuple):
    """What became of a claimed deletion, and in how many seconds to go on; None if it has ended.

    Without a detail or a job, those that are known stay. With a `pause`, nothing else is asked of
    the provider for that time either.
    """

    state: str
    seconds: float | None
    detail: str | None = None
    job: str | None = None
    error: str | None = None
    pause: float | None = None


@dataclass(frozen=True)
class ProviderDeletion:
    """How the deletion of a receipt's person stands at a provider."""

    receipt_id: int
    provider: str
    state: str
    detail: str
    job: str | None
    requested_at: datetime
    accepted_at: datetime | None
    ended_at: datetime | None
    attempts: int
    last_error: str | None
    last_error_at: datetime | None
    next_try_at: datetime | None


def add_provider_deletions(
    connection: Connection, receipt_id: int, sealed: Sequence[bytes]
) -> None:
    """Add what the receipt's providers are to be asked, in the connection's transaction."""
    connection.execute(_ADD, {"receipt_id": receipt_id, "sealed": list(sealed)})


def claim_deletion(
    connection: Connection, provider: str, lease: Lease, pause: float, secret_mark: bytes
) -> ClaimedDeletion | None:
    """Claim what has been due longest, or None if nothing is.

    Whichever process claims, the provider is left alone for `pause` seconds between two of them.
    """
    wanted = {"provider": provider, "secret_mark": secret_mark}
    with connection.begin():
        found = connection.scalar(_FIND_DUE, wanted)
        if found is None:
            return None
        connection.execute(BEGIN_LIGHTLY)
        now = connection.scalar(_NOW)
        turn = {"provider": provider, "pause": pause, "now": now}
        failures = connection.scalar(_TAKE_TURN, turn)
        if failures is None:
            return None
        values = {"id": found, "lease": lease.id, "seconds": lease.seconds}
        row = connection.execute(_LEASE, values).mappings().first()
    if row is None:
        return None
    sealed = None if row["sealed"] is None else bytes(row["sealed"])
    return ClaimedDeletion(**{**row, "sealed": sealed}, now=now, failures=failures)


def record_progress(
    connection: Connection, provider: str, lease: UUID, deletion_id: int, progress: Progress
) -> None:
    """Record what became of a claimed deletion, unless its lease has passed to another process."""
    values = progress._asdict()
    pause = values.pop("pause")
    with connection.begin():
        values |= {"id": deletion_id, "lease": lease, "now": connection.scalar(_NOW)}
        connection.execute(_RECORD, values)
        if pause is None:
            connection.execute(_NOTE_SUCCESS, {"provider": provider})
        else:
            failed = {"provider": provider, "pause": pause, "now": values["now"]}
            connection.execute(_NOTE_FAILURE, failed)


def read_provider_deletions(
    connection: Connection, receipt_ids: Sequence[int]
) -> Mapping[int, Sequence[ProviderDeletion]]:
    """Return how the deletions of some receipts stand, by the numbers of these."""
    found = defaultdict(list)
    with connection.begin():
        for row in connection.execute(_READ, {"receipt_ids": list(receipt_ids)}).mappings():
            found[row["receipt_id"]].append(ProviderDeletion(**row))
    return found
