"""Persons with events in every place where events are kept."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg2

from productgraph.v1.event_pb2 import Event
from server.protocols import GRPC, HTTP
from server.storage.connection import connected, open_engine
from server.storage.dead_events import bury_events
from server.storage.events import EventStore
from server.storage.outbox import Outbox
from server.storage.rejected_events import Rejection, insert_rejections
from tests.support.events import ENCODER, encode_message, make_event, make_message

PROVIDERS = ("amplitude", "mixpanel")


@dataclass(frozen=True)
class Database:
    """A migrated database, into which a test puts what the service would."""

    url: str

    def query(self, statement: str, *parameters: Any) -> list[Any]:
        """Run a statement and return its rows."""
        with closing(psycopg2.connect(self.url)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def store(self, events: Sequence[Event]) -> None:
        """Store events in one commit, and keep them for both providers."""
        rows = [encode_message(event) for event in events]
        store = EventStore(ENCODER.columns, Outbox(PROVIDERS, 1).statements_for)
        with connected(open_engine(self.url)) as connection:
            store.save(connection, rows, 10)

    def bury(self, event: Event, answer: str = "", provider: str = "amplitude") -> None:
        """Keep an event as a dead one."""
        row = {
            "provider": provider,
            "project_id": event.project_id,
            "reason": "refused",
            "answer": answer,
            "mapping_version": 1,
            "event": event.SerializeToString(),
            "received_at": datetime.now(UTC),
        }
        with connected(open_engine(self.url)) as connection:
            bury_events(connection, [row])

    def reject(self, project: str, protocol: str, event: bytes, size: int | None = None) -> None:
        """Keep an event as a rejected one."""
        now = datetime.now(UTC)
        rejection = Rejection(project, now, protocol, "wrong", size or len(event), event)
        with connected(open_engine(self.url)) as connection:
            insert_rejections(connection, [rejection])

    def scatter(self, project: str, name: str, user_id: str) -> None:
        """Put events of a user into every place, with ids that begin with a name."""
        self.store([make_message(project, f"{name}-stored", user_id=user_id)])
        self.bury(make_message(project, f"{name}-dead", user_id=user_id))
        rejected = make_message(project, f"{name}-grpc", user_id=user_id)
        self.reject(project, GRPC, rejected.SerializeToString())
        sent = make_event(project, f"{name}-http", {"user.id": user_id})
        self.reject(project, HTTP, json.dumps(sent).encode())
