"""Persons with events in every place where events are kept."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from productgraph.v1.event_pb2 import Event
from server.protocols import GRPC, HTTP
from server.storage.connection import connected, open_engine
from server.storage.dead_events import bury_events
from server.storage.rejected_events import Rejection, insert_rejections
from tests.support.database import Database
from tests.support.events import make_event, make_message


@dataclass(frozen=True)
class PersonDatabase(Database):
    """A database in which persons have events in every place."""

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
