"""Requests of one tenant over both protocols, and what they leave in the table."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection
from typing import Any, cast

import grpc
import psycopg2
from psycopg2.extensions import connection as Connection

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from productgraph.v1.event_pb2 import Event as EventMessage
from tests.support.events import Event, make_event
from tests.support.projects import Project, create_project
from tests.support.services import Service

Outcome = dict[str, Any]

INGEST = "/productgraph.v1.EventIngestionService/IngestEvents"
STREAM = "/productgraph.v1.EventIngestionService/StreamEvents"
_ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; `headers` ignore case."""

    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        """The decoded body; fails where the answer does not say that it is JSON."""
        assert self.headers.get_content_type() == "application/json", self.body
        return json.loads(self.body)


@dataclass(frozen=True)
class Refusal(Exception):
    """A gRPC request refused as a whole."""

    code: str
    text: str


@dataclass(frozen=True)
class Tenant:
    """A project that sends events, and looks at its rows."""

    service: Service
    project: Project
    database: Connection

    def make_event(self, changes: Mapping[str, object] | None = None) -> Event:
        """Return an event with the required fields, and these changes to it."""
        return make_event(self.project.id, "evt_1", changes)

    def make_events(self, count: int) -> list[Event]:
        """Events that differ in their ids only."""
        return [self.make_event({"event_id": f"evt_{number}"}) for number in range(count)]

    def post(self, body: object, **headers: str | None) -> Answer:
        """Post bytes as they are, anything else as JSON; see `send` for the headers."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        usual = {"content_type": "application/json", "x_pg_api_key": self.project.key}
        return send(self.service, "POST", "/v1/events", content, **usual | headers)

    def post_events(self, events: Iterable[object]) -> Outcome:
        """Post a batch, and return what became of it; fail on anything but 202."""
        answer = self.post({"events": list(events)})
        assert answer.status == 202, answer.body
        return cast(Outcome, answer.json)

    def call(self, request: bytes, *, key: str | None = "", gzip: bool = False) -> Outcome:
        """Send a gRPC request, and return what HTTP would answer. Raises Refusal.

        The key is the tenant's own, unless another is given; None sends none.
        """
        key = self.project.key if key == "" else key
        with grpc.insecure_channel(self.service.grpc_target) as channel:
            ingest = bind_ingest(channel)
            try:
                response = ingest(
                    request,
                    timeout=_ANSWER_SECONDS,
                    metadata=() if key is None else (("x-pg-api-key", key),),
                    compression=grpc.Compression.Gzip if gzip else None,
                )
            except grpc.RpcError as error:
                failed = cast(grpc.Call, error)
                raise Refusal(failed.code().name, failed.details()) from None
        errors = [{"index": error.index, "error": error.error} for error in response.errors]
        return {"accepted": response.accepted, "rejected": response.rejected, "errors": errors}

    def ingest(self, events: Iterable[EventMessage | bytes]) -> Outcome:
        """Send a batch over gRPC, in which an event may be the bytes that stand for one."""
        return self.call(encode_request(events))

    def read_rows(self) -> list[dict[str, Any]]:
        """Return the rows in the order of their keys, without received_at, timestamps in UTC."""
        with self.database.cursor() as cursor:
            cursor.execute("SET TimeZone TO 'UTC'")
            cursor.execute(
                "SELECT to_jsonb(events) - 'received_at' FROM events WHERE project_id = %s"
                " ORDER BY event_timestamp, event_id",
                [self.project.id],
            )
            return [row for (row,) in cursor.fetchall()]

    def take_rows(self) -> list[dict[str, Any]]:
        """Return the rows, and delete them."""
        rows = self.read_rows()
        with self.database.cursor() as cursor:
            cursor.execute("DELETE FROM events WHERE project_id = %s", [self.project.id])
        return rows

    @contextmanager
    def failing_storage(self) -> Iterator[str]:
        """Let the table refuse this tenant's rows; yield a word of the database's error."""
        word = f"broken_{self.project.id}"
        check = f"CHECK (project_id <> '{self.project.id}') NOT VALID"
        with self.database.cursor() as cursor:
            cursor.execute(f"ALTER TABLE events ADD CONSTRAINT {word} {check}")
            try:
                yield word
            finally:
                cursor.execute(f"ALTER TABLE events DROP CONSTRAINT {word}")


def bind_ingest(channel: grpc.Channel) -> "grpc.UnaryUnaryMultiCallable[bytes, Any]":
    """Return the ingestion call of a channel, which takes the bytes of a request."""
    return channel.unary_unary(INGEST, bytes, IngestEventsResponse.FromString)


@contextmanager
def open_tenant(service: Service) -> Iterator[Tenant]:
    """Yield a tenant of any service, with a fresh project, while its connection is open."""
    with closing(psycopg2.connect(service.database_url)) as database:
        database.autocommit = True
        yield Tenant(service, create_project(service), database)


class HttpConnection:
    """An HTTP connection for one batch after another, kept open as long as the server lets it.

    What goes wrong is raised, as OSError or HTTPException.
    """

    def __init__(self, port: int, key: str, seconds: float = _ANSWER_SECONDS) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=seconds)
        self._headers = {"Content-Type": "application/json", "X-PG-API-Key": key}

    @property
    def is_open(self) -> bool:
        """Whether it is open for another request."""
        return self._connection.sock is not None

    def begin(self, body: bytes) -> None:
        """Send a batch, over a new connection if there is none."""
        self._connection.request("POST", "/v1/events", body, self._headers)

    def end(self) -> Answer:
        """Return the answer."""
        return _read_answer(self._connection)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def _read_answer(connection: HTTPConnection) -> Answer:
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def send(
    service: Service, method: str, path: str, body: bytes | None = None, **headers: str | None
) -> Answer:
    """Send an HTTP request; `content_type` is the header, None leaves it out."""
    connection = HTTPConnection("127.0.0.1", service.http_port, timeout=_ANSWER_SECONDS)
    sent = {name.replace("_", "-"): text for name, text in headers.items() if text is not None}
    try:
        connection.request(method, path, body, sent)
        return _read_answer(connection)
    finally:
        connection.close()


def encode_request(events: Iterable[EventMessage | bytes]) -> bytes:
    """Return the bytes of an IngestEventsRequest, whatever the bytes of its events."""
    encoded = (e if isinstance(e, bytes) else e.SerializeToString() for e in events)
    return b"".join(frame(1, event) for event in encoded)


def frame(field_number: int, content: bytes) -> bytes:
    """Return a field with a length, as protobuf's wire format has it."""
    return _encode_varint(field_number << 3 | 2) + _encode_varint(len(content)) + content


def _encode_varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _encode_varint(high) if high else bytes([low])


def accepted(count: int) -> Outcome:
    """Return the answer to a batch of this many events, none of them rejected."""
    return {"accepted": count, "rejected": 0, "errors": []}


def create_revoked_key(service: Service, project_id: str) -> str:
    """Return a key that was revoked before it was ever used."""
    key = service.run("keys", "create", "--project", project_id, "--name", "old").stdout.strip()
    listed = service.run("keys", "list").stdout.splitlines()
    [line] = [line for line in listed if project_id in line and "old" in line.split()]
    assert service.run("keys", "revoke", line.split()[0]).returncode == 0
    return key
