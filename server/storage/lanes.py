"""The lanes: how forwarding to each provider stands, and all SQL on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from server.storage.outbox import BEGIN_LIGHTLY

_SEE_LANE = text("""
INSERT INTO forward_lanes (provider, seen_at) VALUES (:provider, now())
    ON CONFLICT (provider) DO UPDATE SET seen_at = excluded.seen_at
""")
_SHOW_LANE = text("""
INSERT INTO forward_lanes AS lane (
    provider, seen_at, stopped_reason, stopped_at, failing_since, last_error, last_error_at,
    next_try_at
) VALUES (
    :provider, now(), :stopped, CASE WHEN CAST(:stopped AS text) IS NOT NULL THEN now() END,
    CASE WHEN CAST(:error AS text) IS NOT NULL THEN now() END, :error,
    CASE WHEN CAST(:error AS text) IS NOT NULL THEN now() END,
    now() + make_interval(secs => :next_try)
) ON CONFLICT (provider) DO UPDATE SET
    seen_at = excluded.seen_at, stopped_reason = excluded.stopped_reason,
    stopped_at = CASE WHEN excluded.stopped_at IS NOT NULL
                      THEN coalesce(lane.stopped_at, excluded.stopped_at) END,
    failing_since = CASE WHEN excluded.failing_since IS NOT NULL
                         THEN coalesce(lane.failing_since, excluded.failing_since) END,
    last_error = coalesce(excluded.last_error, lane.last_error),
    last_error_at = coalesce(excluded.last_error_at, lane.last_error_at),
    next_try_at = excluded.next_try_at
""")
_READ_STATUS = text("""
WITH pending AS (
    SELECT d.provider, sum(d.event_count) AS events,
           min(coalesce(p.retried_at, p.received_at)) AS oldest_at
      FROM outbox_deliveries d JOIN outbox_payloads p ON p.id = d.payload_id GROUP BY 1
), dead AS (SELECT provider, count(*) AS events FROM dead_events GROUP BY 1)
SELECT provider, coalesce(pending.events, 0) AS pending, pending.oldest_at,
       coalesce(lane.delivered, 0) AS delivered, coalesce(dead.events, 0) AS dead,
       lane.stopped_reason, lane.seen_at, lane.failing_since, lane.last_error, lane.last_error_at,
       lane.next_try_at
  FROM forward_lanes lane FULL JOIN pending USING (provider) FULL JOIN dead USING (provider)
 ORDER BY provider
""")
_FIND_ABANDONED = text("""
SELECT provider FROM (
    SELECT provider FROM outbox_deliveries GROUP BY provider
    UNION SELECT provider FROM forward_lanes
     WHERE stopped_at IS NOT NULL OR failing_since IS NOT NULL
) waiting LEFT JOIN forward_lanes lane USING (provider)
 WHERE provider <> ALL(CAST(:enabled AS text[]))
   AND coalesce(lane.seen_at, '-infinity') < now() - make_interval(secs => :seconds)
""")
_FORGET_TROUBLE = text("""
UPDATE forward_lanes SET stopped_reason = NULL, stopped_at = NULL, failing_since = NULL,
       next_try_at = NULL WHERE provider = :provider
""")
_FIND_TROUBLE = text("""
SELECT provider, last_error, stopped_reason FROM forward_lanes
 WHERE last_error IS NOT NULL OR stopped_reason IS NOT NULL ORDER BY provider FOR UPDATE
""")
_SET_TROUBLE = text("""
UPDATE forward_lanes SET last_error = :last_error, stopped_reason = :stopped_reason
 WHERE provider = :provider
""")


@dataclass(frozen=True)
class LaneState:
    """How a forwarder finds a provider: why it is stopped or failing, and the next try."""

    stopped_reason: str | None = None
    error: str | None = None
    seconds_to_next_try: float | None = None


def see_lane(connection: Connection, provider: str) -> None:
    """Note that a forwarder is at work for a provider."""
    with connection.begin():
        connection.execute(BEGIN_LIGHTLY)
        connection.execute(_SEE_LANE, {"provider": provider})


def show_lane(connection: Connection, provider: str, state: LaneState) -> None:
    """Note the same, and how the provider fares."""
    with connection.begin():
        connection.execute(BEGIN_LIGHTLY)
        values = {"stopped": state.stopped_reason, "error": state.error}
        next_try = {"next_try": state.seconds_to_next_try}
        connection.execute(_SHOW_LANE, {"provider": provider, **values, **next_try})


def find_abandoned(connection: Connection, enabled: Sequence[str], seconds: float) -> Sequence[str]:
    """Return the lanes that are not `enabled`, and have had no forwarder for `seconds`."""
    return connection.scalars(_FIND_ABANDONED, {"enabled": [*enabled], "seconds": seconds}).all()


def forget_trouble(connection: Connection, provider: str) -> None:
    """Note that a provider is neither stopped nor failing, since nobody sends to it."""
    with connection.begin():
        connection.execute(_FORGET_TROUBLE, {"provider": provider})


def change_trouble(connection: Connection, change: Callable[[str], str]) -> int:
    """Change what lanes say of their trouble, in the connection's transaction; return how many."""
    count = 0
    for row in connection.execute(_FIND_TROUBLE).mappings().all():
        texts = {name: row[name] for name in ("last_error", "stopped_reason")}
        changed = {name: each if each is None else change(each) for name, each in texts.items()}
        if changed != texts:
            connection.execute(_SET_TROUBLE, {"provider": row["provider"], **changed})
            count += 1
    return count


@dataclass(frozen=True)
class LaneStatus:
    """How forwarding to one provider stands; counts are of events."""

    provider: str
    pending: int
    oldest_at: datetime | None
    delivered: int
    dead: int
    stopped_reason: str | None
    seen_at: datetime | None = None
    failing_since: datetime | None = None
    last_error: str | None = None
    last_error_at: datetime | None = None
    next_try_at: datetime | None = None


def read_status(connection: Connection) -> list[LaneStatus]:
    """Return the lanes that have, or had, anything to do, by their providers' names."""
    rows = connection.execute(_READ_STATUS).mappings()
    return [LaneStatus(**row) for row in rows]
