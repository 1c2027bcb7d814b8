"""The fate of an event: whether each provider has it, will get it, or refused it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, text

from productgraph.v1.event_pb2 import Event
from server.events.encoded_events_pb2 import EncodedEvents
from server.storage.dead_events import find_dead_event
from server.storage.event_queries import StoredEvent
from server.storage.forward_history import ProviderHistory, read_history

DELIVERED, WAITING, DEAD, UNKNOWN = "delivered", "waiting", "dead", "unknown"

# An event and its payload are stored by one transaction, and so received at one time.
_FIND_PAYLOADS = text("""
SELECT p.events, d.provider, d.attempts, d.due_at, d.positions, lane.last_error
  FROM outbox_payloads p JOIN outbox_deliveries d ON d.payload_id = p.id
  LEFT JOIN forward_lanes lane ON lane.provider = d.provider
 WHERE p.project_id = :project_id AND p.received_at = :received_at
""")


@dataclass(frozen=True)
class ProviderFate:
    """What became of an event at one provider, and how that is known."""

    provider: str
    state: str
    details: dict[str, Any] = field(default_factory=dict)


def describe_stored(event: StoredEvent, fates: Sequence[ProviderFate]) -> dict[str, Any]:
    """Return what programs are told of a stored event and its fates."""
    return {
        "event": event.fields,
        "received_at": event.received_at,
        "partition": event.partition,
        "forwarding": [
            {"provider": fate.provider, "state": fate.state, **fate.details} for fate in fates
        ],
    }


def find_fates(connection: Connection, event: StoredEvent) -> list[ProviderFate]:
    """Return what became of a stored event at each provider that it concerns."""
    known = {fate.provider: fate for fate in _find_waiting(connection, event)}
    known |= {fate.provider: fate for fate in _find_dead(connection, event)}
    for history in read_history(connection):
        if history.provider not in known and history.enabled_since is not None:
            known[history.provider] = _conclude(history, history.enabled_since, event.received_at)
    return [known[provider] for provider in sorted(known)]


def _find_waiting(connection: Connection, stored: StoredEvent) -> list[ProviderFate]:
    project_id, _, _ = stored.key
    wanted = {"project_id": project_id, "received_at": stored.received_at}
    return [
        ProviderFate(
            row["provider"],
            WAITING,
            {
                "tries": row["attempts"],
                "next_try_at": row["due_at"],
                "last_error": row["last_error"],
            },
        )
        for row in connection.execute(_FIND_PAYLOADS, wanted).mappings()
        if _find_positions(row["events"], stored)
        & set(row["positions"] or range(len(EncodedEvents.FromString(row["events"]).events)))
    ]


def _find_positions(events: bytes, stored: StoredEvent) -> set[int]:
    encoded = EncodedEvents.FromString(events).events
    return {position for position, event in enumerate(encoded) if _is_same(event, stored)}


def _is_same(encoded: bytes, stored: StoredEvent) -> bool:
    event = Event.FromString(encoded)
    _, timestamp, event_id = stored.key
    return event.event_id == event_id and event.event_timestamp.ToDatetime(tzinfo=UTC) == timestamp


def _find_dead(connection: Connection, stored: StoredEvent) -> list[ProviderFate]:
    project_id, _, event_id = stored.key
    return [
        ProviderFate(
            letter.provider,
            DEAD,
            {
                "id": letter.id,
                "reason": letter.reason,
                "answer": letter.answer,
                "died_at": letter.died_at,
            },
        )
        for letter in find_dead_event(connection, project_id, event_id)
        if _is_same(letter.event, stored)
    ]


def _conclude(
    history: ProviderHistory, enabled_since: datetime, received_at: datetime
) -> ProviderFate:
    """Return the fate of an event that neither waits nor is dead."""
    if received_at < enabled_since:
        details: dict[str, Any] = {"why": "not enabled when it came", "since": enabled_since}
        return ProviderFate(history.provider, UNKNOWN, details)
    if history.purged_until is not None and received_at <= history.purged_until:
        details = {"why": "purged", "until": history.purged_until}
        return ProviderFate(history.provider, UNKNOWN, details)
    return ProviderFate(history.provider, DELIVERED)
