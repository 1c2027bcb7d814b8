"""A database into which a test puts what the service would."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg2
from sqlalchemy import event

from productgraph.v1.event_pb2 import Event
from server.forwarding.providers.provider import CURRENT_MAPPING_VERSION
from server.storage.connection import Engine, connected, open_engine
from server.storage.events import EventStore
from server.storage.outbox import Outbox
from tests.support.events import ENCODER, encode_message

PROVIDERS = ("amplitude", "mixpanel")
# The locks that somebody waits for in the database that is asked: the server has those of other
# tests too, which run at the same time.
WAITING_LOCKS = """(
    SELECT l.* FROM pg_locks l JOIN pg_stat_activity USING (pid)
     WHERE NOT granted AND datname = current_database()
) AS waiting"""


@dataclass(frozen=True)
class Database:
    """A database with the tables of this version."""

    url: str

    def query(self, statement: str, *parameters: Any) -> list[Any]:
        """Run a statement and return its rows."""
        with closing(psycopg2.connect(self.url)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def store(self, events: Sequence[Event]) -> None:
        """Store events in one commit and queue them for both providers, as the service does."""
        rows = [encode_message(event) for event in events]
        outbox = Outbox(PROVIDERS, CURRENT_MAPPING_VERSION)
        with connected(open_engine(self.url)) as connection:
            EventStore(ENCODER.columns, outbox.statements_for).save(connection, rows, 10)


@contextmanager
def noted_statements(engine: Engine, word: str) -> Iterator[list[str]]:
    """Note the statements with this word that run in the context."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if word in statement:
            seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine, "before_cursor_execute", note)
