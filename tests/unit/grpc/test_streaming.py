"""StreamEvents: what is in flight, and how streams end."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import Queue
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo

from productgraph.v1.event_ingestion_service_pb2 import (
    IngestEventsRequest,
    IngestEventsResponse,
    StreamEventsRequest,
    StreamEventsResponse,
)
from server.caller import Caller
from server.deadline import Deadline
from server.errors import InvalidEvents, Unauthenticated, Unavailable
from server.grpc import streaming
from server.grpc.api import IngestServicer
from server.grpc.server import GrpcServer
from server.ingest.ingestion import Answer
from server.ingest.request_record import RequestRecord, RequestRecorder
from server.ingest.service import IngestService
from server.processes.ports import reserve_ports
from tests.support.background import repeating
from tests.support.clients import STREAM
from tests.support.services import wait_until

SECONDS = 60.0


class HeldService:
    """Stands in for the service: what it takes is stored when the test says so."""

    def __init__(self) -> None:
        self.admission = SimpleNamespace(identify=self.identify)
        self.is_revoked = False
        self.taken: list[bytes] = []
        self.deadlines: list[Deadline] = []
        self._held: list[Future[None]] = []
        self._lock = threading.Lock()

    def identify(self, _key: str) -> Caller:
        """Return the caller, unless the key is revoked."""
        if self.is_revoked:
            raise Unauthenticated
        return Caller("proj", 1)

    def find_deadline(self, *, seconds: float | None = None) -> Deadline:
        """Return a deadline of its own for each message."""
        del seconds
        self.deadlines.append(Deadline(time.monotonic() + SECONDS))
        return self.deadlines[-1]

    def ingest(self, _caller: Caller, body: bytes, *_: object, strict: bool) -> Answer:
        """Take a message; some bodies fail."""
        if body == b"away":
            raise Unavailable("not stored")
        if body == b"invalid" and strict:
            raise InvalidEvents([(0, "event_id: required")], 1)
        stored: Future[None] = Future()
        with self._lock:
            self.taken.append(body)
            self._held.append(stored)
        return Answer(IngestEventsResponse(accepted=len(body)), [], stored)

    def store(self) -> None:
        """Store what is held."""
        with self._lock:
            held, self._held = self._held, []
        for stored in held:
            stored.set_result(None)


class Collector:
    """A sink that keeps what was recorded."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def record(self, request: RequestRecord) -> None:
        """Keep a record."""
        self.records.append(request)


class Stream:
    """A client's stream, whose messages are sent as the test wants."""

    def __init__(self, channel: grpc.Channel, *metadata: tuple[str, str]) -> None:
        self._messages: Queue[bytes | None] = Queue()
        begin = channel.stream_stream(STREAM, bytes, StreamEventsResponse.FromString)
        messages = iter(self._messages.get, None)
        self.call: Any = begin(messages, metadata=metadata, timeout=2 * SECONDS)

    def send(self, *messages: bytes) -> None:
        """Send messages, which are queued here until the server takes them."""
        for message in messages:
            self._messages.put(message)

    def finish(self) -> None:
        """Send no more."""
        self._messages.put(None)

    def read(self) -> StreamEventsResponse:
        """Return the next answer."""
        return cast(StreamEventsResponse, next(self.call))

    def read_all(self) -> list[StreamEventsResponse]:
        """Return all answers up to the end of the stream, whatever that is."""
        answers: list[StreamEventsResponse] = []
        with suppress(grpc.RpcError):
            answers.extend(self.call)
        return answers


@contextmanager
def serving(service: HeldService, *sinks: Collector) -> Iterator[tuple[threading.Thread, Any]]:
    """Serve the edge in this process; yield a thread that stops it once started, and a channel."""
    servicer = IngestServicer(cast(IngestService, service), RequestRecorder(sinks))
    with reserve_ports("127.0.0.1", {"GRPC_PORT": 0}) as ports:
        address = f"127.0.0.1:{ports['GRPC_PORT']}"
        server = GrpcServer(servicer, lambda: True, address=address, offer_reflection=False)
        server.start()
        stopping = threading.Thread(target=server.stop, args=(SECONDS,))
        try:
            with grpc.insecure_channel(address) as channel:
                yield stopping, channel
        finally:
            service.store()
            if not stopping.ident:
                stopping.start()
            stopping.join()


@pytest.fixture
def held() -> HeldService:
    """Return a service that holds what it takes."""
    return HeldService()


def accepted(answers: list[StreamEventsResponse]) -> list[int]:
    """Return the numbers of events accepted, all of which were."""
    assert all(answer.HasField("response") for answer in answers), answers
    return [answer.response.accepted for answer in answers]


def test_messages_of_a_stream_are_answered_in_order(held: HeldService) -> None:
    """Each answer comes after its commit, and none before those of earlier messages."""
    with serving(held) as (_, channel):
        stream = Stream(channel)
        stream.send(*(b"x" * size for size in (3, 1, 100_000, 2)))
        stream.finish()
        wait_until(lambda: len(held.taken) == 4)
        held.store()
        assert accepted(stream.read_all()) == [3, 1, 100_000, 2]
        assert stream.call.code() is grpc.StatusCode.OK


def test_a_failing_message_does_not_end_its_stream(held: HeldService) -> None:
    """It is answered with its status, with RetryInfo if a retry can help, and the next is taken."""
    with serving(held) as (_, channel):
        stream = Stream(channel)
        stream.send(b"away")
        status = stream.read().status
        assert (status.code, status.message) == (14, "not stored")
        retry = RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.seconds == 1
        stream.send(b"next")
        wait_until(lambda: held.taken)
        held.store()
        assert stream.read().response.accepted == 4


def test_strict_handling_holds_for_each_message_of_a_stream(held: HeldService) -> None:
    """A strict stream answers a message that has an invalid event with its errors."""
    with serving(held) as (_, channel):
        stream = Stream(channel, ("prefer", "handling=strict"))
        assert dict(stream.call.initial_metadata())["preference-applied"] == "handling=strict"
        stream.send(b"invalid")
        status, errors = stream.read().status, IngestEventsResponse()
        assert status.code == 3
        assert status.details[0].Unpack(errors)
        assert [error.error for error in errors.errors] == ["event_id: required"]


def test_each_message_of_a_stream_has_a_record(held: HeldService) -> None:
    """A stream's messages are logged, counted and traced one by one, each with its deadline."""
    collector = Collector()
    with serving(held, collector) as (_, channel):
        trace = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        stream = Stream(channel, ("x-request-id", "mine"), trace)
        stream.send(b"one", b"away", b"three")
        wait_until(lambda: len(held.taken) == 2)
        held.store()
        for _ in range(3):
            stream.read()
        assert len(held.deadlines) == 3
    found = [(record.request_id, record.status) for record in collector.records]
    assert found == [("mine.1", "OK"), ("mine.2", "UNAVAILABLE"), ("mine.3", "OK")]
    assert {record.project_id for record in collector.records} == {"proj"}
    assert {record.traceparent for record in collector.records} == {trace[1]}
    assert {record.route.rpartition("/")[2] for record in collector.records} == {"StreamEvents"}


def test_a_stream_without_a_key_is_refused(held: HeldService) -> None:
    """It ends before a message is read, and that is recorded."""
    held.is_revoked, collector = True, Collector()
    with serving(held, collector) as (_, channel):
        stream = Stream(channel)
        assert stream.read_all() == []
        assert stream.call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [record.status for record in collector.records] == ["UNAUTHENTICATED"]


def test_a_revoked_key_ends_its_stream(held: HeldService) -> None:
    """What was taken before is answered; the message that comes after is not stored."""
    with serving(held) as (_, channel):
        stream = Stream(channel)
        stream.send(b"before")
        wait_until(lambda: held.taken)
        held.is_revoked = True
        stream.send(b"after", b"after")
        wait_until(lambda: stream.call.initial_metadata())
        time.sleep(0.2)
        held.store()
        before, after = stream.read_all()
        assert (before.response.accepted, after.status.code) == (6, 16)
        assert stream.call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert held.taken == [b"before"]


@pytest.mark.parametrize(("size", "most"), [(1, 128), (200_000, 21)])
def test_a_stream_takes_no_more_than_it_may_have(size: int, most: int, held: HeldService) -> None:
    """Messages wait with the client while too many, or too large ones, are unanswered."""
    with serving(held) as (_, channel):
        stream = Stream(channel)
        stream.send(*([b"x" * size] * (2 * most)))
        stream.finish()
        wait_until(lambda: len(held.taken) == most)
        time.sleep(0.3)
        assert len(held.taken) == most
        answering = threading.Thread(target=keep_storing, args=(held, 2 * most))
        answering.start()
        assert accepted(stream.read_all()) == [size] * (2 * most)
        answering.join()


def keep_storing(held: HeldService, count: int) -> None:
    """Store what is held until this many messages were taken."""
    wait_until(lambda: held.store() or len(held.taken) == count)  # type: ignore[func-returns-value]
    held.store()


@pytest.mark.parametrize("seconds", [1.0, SECONDS], ids=["age", "stop"])
def test_no_message_that_a_stream_took_is_left_unanswered(
    seconds: float, held: HeldService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its age, or when the server stops, a stream answers what it took before it ends."""
    monkeypatch.setattr(streaming, "STREAM_SECONDS", seconds)
    with serving(held) as (stopping, channel):
        stream, begun = Stream(channel), time.monotonic()
        stream.send(*([b"x"] * 20))
        # At its age the stream takes no more: on a busy machine it may have fewer then.
        wait_until(lambda: len(held.taken) == 20 or time.monotonic() > begun + seconds)
        if seconds == SECONDS:
            stopping.start()
        time.sleep(1.5)
        with repeating(held.store, 0.05):
            answers = stream.read_all()
        assert accepted(answers) == [1] * len(held.taken)
        assert stream.call.code() is grpc.StatusCode.UNAVAILABLE
        assert "open another" in stream.call.details()


def test_a_silent_stream_makes_room_for_another(
    held: HeldService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If too many streams are open, the one that has been silent longest ends, with its answers."""
    monkeypatch.setattr(streaming, "_RECEIVING_STREAMS", 4)  # two for a sender
    with serving(held) as (_, channel):
        first, second = Stream(channel), Stream(channel)
        first.send(b"1")
        wait_until(lambda: held.taken == [b"1"])
        second.send(b"2")
        wait_until(lambda: held.taken == [b"1", b"2"])
        third = Stream(channel)
        third.send(b"3")
        time.sleep(1.5)
        held.store()
        wait_until(lambda: len(held.taken) == 3)
        held.store()
        assert accepted(first.read_all()) == [1]
        assert first.call.code() is grpc.StatusCode.UNAVAILABLE
        assert accepted([second.read(), third.read()]) == [1, 1]


def test_a_client_that_goes_leaves_nothing_behind(held: HeldService) -> None:
    """The messages of a stream that its client ends are recorded, and the server goes on."""
    collector = Collector()
    with serving(held, collector) as (_, channel):
        stream = Stream(channel)
        stream.send(b"1", b"2")
        wait_until(lambda: len(held.taken) == 2)
        stream.call.cancel()
        wait_until(lambda: len(collector.records) == 2)
        assert {record.status for record in collector.records} == {"CANCELLED"}
        other = Stream(channel)
        other.send(b"3")
        wait_until(lambda: len(held.taken) == 3)
        held.store()
        assert other.read().response.accepted == 1


def test_both_methods_have_the_same_limits() -> None:
    """A message of a stream may hold what a request may."""
    requests = [each.DESCRIPTOR for each in (IngestEventsRequest, StreamEventsRequest)]
    limits = [
        (str(request.GetOptions()), str(request.fields_by_name["events"].GetOptions()))
        for request in requests
    ]
    assert limits[0] == limits[1]
    assert "1000" in limits[0][1]
