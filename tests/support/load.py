"""Clients that keep a service busy, and remember what they were answered."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import grpc
import psycopg2

from tests.support.clients import HttpConnection, bind_ingest, encode_request
from tests.support.events import Event, make_event, to_message
from tests.support.projects import Project
from tests.support.services import Service

# The answers of both protocols to events that are stored.
STORED = {"202", "OK"}
# The answers of both protocols to events that could not be stored in time.
NOT_STORED = {"503", "UNAVAILABLE"}
# Between two requests of a client, so that what is measured is not the clients themselves.
_PAUSE_SECONDS = 0.1
_ANSWER_SECONDS = 30.0


class Client(Protocol):
    """Sends batches of events, one at a time."""

    def begin(self, events: Sequence[Event]) -> None:
        """Send them."""

    def end(self) -> str:
        """Return the status as the protocol names it, and more if an event was not accepted."""

    def close(self) -> None:
        """End the connection."""


class HttpClient:
    """A connection kept alive, and renewed as HTTP libraries do it.

    Where one ends before any byte of the answer, the request is sent once more on a new one: a
    server may close an idle connection in the moment in which a client uses it again. What else
    goes wrong is raised, as OSError or HTTPException.
    """

    def __init__(self, service: Service, key: str) -> None:
        self._connection = HttpConnection(service.http_port, key)
        self._events: Sequence[Event] = ()

    @property
    def is_open(self) -> bool:
        """Whether the server has left the connection open for another request."""
        return self._connection.is_open

    def begin(self, events: Sequence[Event]) -> None:
        """Send a request."""
        self._events = events
        try:
            self._request()
        except (ConnectionResetError, BrokenPipeError):
            self._connection.close()
            self._request()

    def end(self) -> str:
        """Return the status of the answer."""
        try:
            answer = self._connection.end()
        except (ConnectionResetError, BrokenPipeError):
            self._connection.close()
            self._request()
            answer = self._connection.end()
        rejected = answer.status == 202 and answer.json["accepted"] != len(self._events)
        return f"{answer.status} {answer.json}" if rejected else str(answer.status)

    def _request(self) -> None:
        self._connection.begin(json.dumps({"events": self._events}).encode())

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


class GrpcClient:
    """A channel with a connection of its own, which waits for one where there is none."""

    def __init__(self, service: Service, key: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(service.grpc_target, options)
        self._ingest = bind_ingest(self.channel)
        self._metadata = (("x-pg-api-key", key),)
        self._count = 0

    def begin(self, events: Sequence[Event]) -> None:
        """Start a call."""
        self._count = len(events)
        self._call = self._ingest.future(
            encode_request(map(to_message, events)),
            metadata=self._metadata,
            timeout=_ANSWER_SECONDS,
            wait_for_ready=True,
        )

    def end(self) -> str:
        """Return the name of its status code."""
        code: str = self._call.code().name  # waits for the answer
        rejected = code == "OK" and self._call.result().accepted != self._count
        return f"{code} {self._call.result()}" if rejected else code

    def close(self) -> None:
        """End the connection."""
        self.channel.close()


def send(client: Client, events: Sequence[Event]) -> str:
    """Return the status of the answer, or the name of the error that came instead."""
    try:
        client.begin(events)
        return client.end()
    except (OSError, http.client.HTTPException) as error:
        client.close()
        return type(error).__name__


@dataclass(frozen=True)
class Answer:
    """What became of a request with one event; `sent_at` is of `time.monotonic`."""

    event_id: str
    status: str
    sent_at: float
    seconds: float


@dataclass
class Load:
    """What the clients of `running_load` have been answered so far."""

    answers: list[Answer] = field(default_factory=list)

    def statuses(self) -> set[str]:
        """Every status there was."""
        return {answer.status for answer in tuple(self.answers)}

    def stored(self, since: float = 0.0) -> set[str]:
        """Return the ids of the events that were sent since then and acknowledged."""
        answers = tuple(self.answers)
        return {a.event_id for a in answers if a.status in STORED and a.sent_at >= since}

    def longest(self) -> float:
        """How long the slowest answer took, in seconds."""
        return max(answer.seconds for answer in self.answers)


def _now() -> Event:
    return {"event.timestamp": datetime.now(UTC).isoformat()}


@contextmanager
def running_load(
    service: Service, project: Project, *, http_clients: int, grpc_clients: int = 0
) -> Iterator[Load]:
    """Clients that send one new event after another until the context ends."""
    load, stop = Load(), threading.Event()
    kinds: list[Callable[[Service, str], Client]]
    kinds = [HttpClient] * http_clients + [GrpcClient] * grpc_clients

    def run(client: Client) -> None:
        while not stop.is_set():
            event, sent_at = make_event(project.id, changes=_now()), time.monotonic()
            status = send(client, [event])
            seconds = time.monotonic() - sent_at
            load.answers.append(Answer(event["event_id"], status, sent_at, seconds))
            stop.wait(_PAUSE_SECONDS)

    with ExitStack() as stack:
        for kind in kinds:
            client = stack.enter_context(closing(kind(service, project.key)))
            thread = threading.Thread(target=run, args=[client])
            thread.start()
            stack.callback(thread.join)
        stack.callback(stop.set)
        yield load


def read_stored(service: Service, project: Project) -> list[str]:
    """Return the ids of a project's events in the table, one for each row."""
    with closing(psycopg2.connect(service.database_url)) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT event_id FROM events WHERE project_id = %s", [project.id])
        return [event_id for (event_id,) in cursor.fetchall()]
