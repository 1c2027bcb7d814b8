"""The events that the clients send, in batches that know what was meant to become of each."""

import itertools
import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.json_format import MessageToDict

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsRequest
from productgraph.v1.event_pb2 import Event
from server.forwarding.providers.mapping import make_insert_id

PROJECT = "proj_torture"
# In every event, and in no log.
MARKER = "marker-7f3a9c-of-a-payload"
# The user whose events Amplitude's stand-in refuses.
REFUSED_USER = "user-refused"
_MOST_EVENTS = 12
_REJECTED_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Batch:
    """One request in both encodings: insert ids of its events by their ids, and of rejected ones.

    `refused` are the ids of events that are accepted, and that both providers refuse.
    """

    insert_ids: dict[str, str]
    rejected: dict[str, str]
    refused: frozenset[str]
    body: bytes
    request: bytes


class EventSource:
    """Makes the batches of one round, each event with a time of that round; for many threads."""

    def __init__(self, epoch: datetime, number: int, seed: str) -> None:
        self.begin = epoch + timedelta(seconds=number)
        self.end = self.begin + timedelta(seconds=1)
        self._number = number
        self._random = random.Random(seed)
        self._count = itertools.count()
        self._lock = threading.Lock()

    def make_batch(
        self,
        *,
        size: int | None = None,
        refused: int = 0,
        change: Callable[[int, Event], None] = lambda _index, _event: None,
        has_body: bool = True,
    ) -> Batch:
        """Make a batch of `size` events, or of a few; the providers refuse the first `refused`.

        `change` is given each event with its index, before they are mixed. Without a body, the
        batch is for gRPC alone.
        """
        with self._lock:
            count = size or self._random.randint(1, _MOST_EVENTS)
            has_rejected = size is None and self._random.random() < _REJECTED_SHARE
            events = [self._make_event() for _ in range(count)]
            for index, event in enumerate(events):
                change(index, event)
            bad = [self._make_rejected()] if has_rejected else []
            mixed = self._random.sample(events + bad, len(events + bad))
        return Batch(
            insert_ids={event.event_id: make_insert_id(event) for event in events},
            rejected={event.event_id: make_insert_id(event) for event in bad},
            refused=frozenset(event.event_id for event in events[:refused]),
            body=_encode_body(mixed) if has_body else b"",
            request=IngestEventsRequest(events=mixed).SerializeToString(),
        )

    def _make_event(self) -> Event:
        number = next(self._count)
        event = Event(
            event_id=f"evt-{self._number}-{number}",
            project_id=PROJECT,
            session_id=f"sess-{self._random.randint(0, 20)}",
            event_type="custom",
            event_sequence=number,
            page_title=MARKER,
        )
        offset = timedelta(microseconds=self._random.randrange(1_000_000))
        event.event_timestamp.FromDatetime(self.begin + offset)
        event.metadata.update({"note": MARKER, "number": number})
        return event

    def _make_rejected(self) -> Event:
        event = self._make_event()
        event.event_type = "no.such.type"
        event.event_id = f"rejected-{event.event_id}"
        return event


def _encode_body(events: list[Event]) -> bytes:
    return json.dumps({"events": list(map(_to_json, events))}).encode()


def _to_json(event: Event) -> dict[str, Any]:
    moment = event.event_timestamp.ToDatetime(UTC).isoformat(timespec="microseconds")
    rare = {"user.id": event.user_id, "page.url": event.page_url}
    return {
        "event_id": event.event_id,
        "project_id": event.project_id,
        "session.id": event.session_id,
        "event.type": event.event_type,
        "event.timestamp": moment,
        "page.title": event.page_title,
        "event.sequence": event.event_sequence,
        "metadata": MessageToDict(event.metadata),
    } | {name: value for name, value in rare.items() if value}
