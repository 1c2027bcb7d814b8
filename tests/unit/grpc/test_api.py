"""The gRPC edge beside what is slow or hostile: large messages, and pings."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from server.caller import Caller
from server.deadline import Deadline
from server.grpc.api import IngestServicer
from server.grpc.server import GrpcServer
from server.ingest.ingestion import Answer
from server.ingest.request_record import RequestRecorder
from server.ingest.service import IngestService
from server.processes.ports import reserve_ports
from tests.support.clients import bind_ingest
from tests.support.http2 import ACK, GOAWAY, PING, connected
from tests.support.services import wait_until

LARGE, SMALL = b"x" * 100_000, b"x"
SECONDS = 20.0


@pytest.fixture
def free_port() -> Iterator[int]:
    """Provide a port that nobody else can take."""
    with reserve_ports("127.0.0.1", {"GRPC_PORT": 0}) as ports:
        yield ports["GRPC_PORT"]


class BlockingService:
    """Stands in for the service: a large request blocks until `go` is set."""

    def __init__(self, timeout_seconds: float = SECONDS) -> None:
        self.admission = SimpleNamespace(identify=lambda _key: Caller("proj", 1))
        self.entered, self.go = threading.Event(), threading.Event()
        self.timeout_seconds = timeout_seconds

    def find_deadline(self, *, seconds: float | None = None) -> Deadline:
        """Return a deadline that is the same for all clients."""
        del seconds
        return Deadline(monotonic() + self.timeout_seconds)

    def ingest(self, _caller: Caller, body: bytes, *_: object, **__: object) -> Answer:
        """Accept a request at once, or block."""
        if len(body) > 1000:
            self.entered.set()
            assert self.go.wait(SECONDS)
        stored: Future[None] = Future()
        stored.set_result(None)
        return Answer(IngestEventsResponse(accepted=1), [], stored)


@contextmanager
def serving(service: BlockingService, port: int) -> Iterator[str]:
    """Serve the edge in this process."""
    servicer = IngestServicer(cast(IngestService, service), RequestRecorder())
    server = GrpcServer(servicer, lambda: True, address=f"127.0.0.1:{port}", offer_reflection=False)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        service.go.set()
        server.stop(1.0)


def test_a_blocked_event_loop_does_not_turn(free_port: int) -> None:
    """When the event loop has last turned is known, and does not change while it is blocked."""
    service = BlockingService()
    servicer = IngestServicer(cast(IngestService, service), RequestRecorder())
    address = f"127.0.0.1:{free_port}"
    server = GrpcServer(servicer, lambda: True, address=address, offer_reflection=False)
    server.start()
    try:
        begun = server.turned_at
        wait_until(lambda: server.turned_at > begun)
        with grpc.insecure_channel(address) as channel:
            # Few enough bytes to be read in the loop, in which this service blocks.
            calling = call(channel, b"x" * 2000)
            assert service.entered.wait(SECONDS)
            blocked = server.turned_at
            sleep(1.2)
            assert server.turned_at == blocked
            service.go.set()
            assert calling.result()
            wait_until(lambda: server.turned_at > blocked)
    finally:
        service.go.set()
        server.stop(1.0)


def call(channel: grpc.Channel, message: bytes) -> Any:
    """Begin a call with a message."""
    return bind_ingest(channel).future(message, timeout=SECONDS)


def test_a_large_message_blocks_nobody(free_port: int) -> None:
    """While a large message is read, small ones are answered."""
    service = BlockingService()
    with serving(service, free_port) as target, grpc.insecure_channel(target) as channel:
        large = call(channel, LARGE)
        assert service.entered.wait(SECONDS)
        for _ in range(5):
            assert call(channel, SMALL).result()
        assert not large.done()
        service.go.set()
        assert large.result()


def test_a_large_message_is_refused_at_its_deadline(free_port: int) -> None:
    """A large message that waits too long for another one is refused before that is through."""
    service = BlockingService(timeout_seconds=2.0)
    with serving(service, free_port) as target, grpc.insecure_channel(target) as channel:
        first = call(channel, LARGE)
        assert service.entered.wait(SECONDS)
        service.timeout_seconds = 0.3
        for each in (call(channel, LARGE), call(channel, LARGE), first):
            assert each.code() is grpc.StatusCode.UNAVAILABLE
            assert each.details() == "not answered in time"
        service.timeout_seconds = SECONDS
        assert call(channel, SMALL).result()
        assert not service.go.is_set()


def test_usual_pings_are_answered_and_a_flood_is_sent_away(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle connection may ping at the allowed pace, and no faster."""
    monkeypatch.setattr("server.grpc.server._PING_INTERVAL_MS", 50)
    with serving(BlockingService(), free_port), connected(free_port) as client:
        for number in range(8):
            client.send(PING, 0, 0, bytes([number]) * 8)
            assert client.wait_for(PING).flags & ACK
            sleep(0.1)
        # In one piece: sending after the end would reset the connection, and lose the answer.
        client.send(PING, 0, 0, bytes(8), times=50)
        assert b"too_many_pings" in client.wait_for(GOAWAY).payload
