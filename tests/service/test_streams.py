"""StreamEvents against the running service."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, cast

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo

from productgraph.v1.event_ingestion_service_pb2 import StreamEventsResponse
from tests.service.test_rate_limits import limited
from tests.support.clients import STREAM, Outcome, Tenant, accepted, encode_request
from tests.support.events import Event, to_message
from tests.support.services import wait_for, wait_until

SECONDS = 60.0


class Stream:
    """A stream of batches, whose answers are read one by one."""

    def __init__(self, channel: grpc.Channel, key: str, request_id: str) -> None:
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        begin = channel.stream_stream(STREAM, bytes, StreamEventsResponse.FromString)
        metadata = (("x-pg-api-key", key), ("x-request-id", request_id))
        messages = iter(self._messages.get, None)
        self.call: Any = begin(messages, metadata=metadata, timeout=2 * SECONDS)

    def send(self, *events: Event) -> None:
        """Send a batch."""
        self.send_bytes(encode_request(map(to_message, events)))

    def send_bytes(self, message: bytes) -> None:
        """Send a message, whatever it is."""
        self._messages.put(message)

    def finish(self) -> None:
        """Send no more."""
        self._messages.put(None)

    def read(self) -> StreamEventsResponse:
        """Return the next answer."""
        return cast(StreamEventsResponse, next(self.call))

    def read_outcome(self) -> Outcome:
        """Return the next answer, which must be no status, as HTTP has it."""
        answer = self.read()
        assert answer.HasField("response"), answer
        response = answer.response
        errors = [{"index": error.index, "error": error.error} for error in response.errors]
        return {"accepted": response.accepted, "rejected": response.rejected, "errors": errors}


@contextmanager
def streaming(tenant: Tenant, request_id: str = "") -> Iterator[Stream]:
    """Open a stream of a tenant's."""
    with grpc.insecure_channel(tenant.service.grpc_target) as channel:
        stream = Stream(channel, tenant.project.key, request_id)
        try:
            yield stream
        finally:
            stream.finish()


def test_every_batch_of_a_stream_is_stored_and_answered(tenant: Tenant) -> None:
    """Batches of all sizes are answered in order, and all their events are in the table."""
    sizes = [1, 50, 0, 1000, 3, 1]
    events = tenant.make_events(sum(sizes))
    with streaming(tenant) as stream:
        for size in sizes:
            stream.send(*events[:size])
            events = events[size:]
        stream.finish()
        assert [stream.read_outcome() for _ in sizes] == [accepted(size) for size in sizes]
        with pytest.raises(StopIteration):
            stream.read()
    assert len(tenant.read_rows()) == sum(sizes)


def test_no_message_ends_the_stream_of_another(tenant: Tenant) -> None:
    """After a message with too many events, and one that is none, the next is stored."""
    with streaming(tenant) as stream:
        stream.send(*tenant.make_events(1001))
        status = stream.read().status
        assert (status.code, status.message) == (3, "events: more than 1000 in one batch")
        stream.send_bytes(b"\xff\xff")
        assert stream.read().status.message == "request: not an IngestEventsRequest"
        stream.send(tenant.make_event({"session.id": ""}), tenant.make_event())
        expected = {"accepted": 1, "rejected": 1}
        assert stream.read_outcome() == expected | {
            "errors": [{"index": 0, "error": "session.id: required"}]
        }


def test_a_limited_message_says_when_to_come_again(tenant: Tenant) -> None:
    """A message over the rate is answered with RetryInfo, and the stream goes on."""
    slow = limited(tenant, event_rate=10)
    with streaming(slow) as stream:
        stream.send(*slow.make_events(30))
        assert stream.read_outcome() == accepted(30)
        answers: list[StreamEventsResponse] = []

        def is_refused() -> bool:
            stream.send(*slow.make_events(30))
            answers.append(stream.read())
            return answers[-1].HasField("status")

        wait_until(is_refused)  # on a busy machine, the first of them may come late enough
        status, retry = answers[-1].status, RetryInfo()
        assert (status.code, status.message) == (8, "rate limit exceeded: 10 events/s")
        assert status.details[0].Unpack(retry)
        time.sleep(retry.retry_delay.seconds)
        stream.send(*slow.make_events(1))
        assert stream.read_outcome() == accepted(1)


def test_a_fault_in_one_message_spares_the_next(tenant: Tenant) -> None:
    """What the database refuses is answered by itself, without details."""
    with streaming(tenant) as stream:
        with tenant.failing_storage() as word:
            stream.send(tenant.make_event())
            status = stream.read().status
            assert status.code in (13, 14)
            assert word not in status.message
        wait_until(lambda: store_one(stream, tenant))
    assert len(tenant.read_rows()) == 1


def store_one(stream: Stream, tenant: Tenant) -> bool:
    """Send an event, and return whether it was stored."""
    stream.send(tenant.make_event())
    return stream.read().HasField("response")


def test_each_message_of_a_stream_is_logged(tenant: Tenant) -> None:
    """The log has a line for each, by the stream's id and the message's number."""
    request_id = f"stream-{tenant.project.id}"
    with streaming(tenant, request_id) as stream:
        for _ in range(3):
            stream.send(tenant.make_event())
            assert stream.read_outcome() == accepted(1)
    expected = [f"{request_id}.{number}" for number in (1, 2, 3)]

    def find_lines() -> list[str]:
        records = [line for line in tenant.service.read_log() if line["message"] == "request"]
        return [line["request_id"] for line in records if request_id in line["request_id"]]

    wait_for(find_lines, expected)


@pytest.mark.slow
def test_a_revoked_key_ends_its_stream_in_time(tenant: Tenant) -> None:
    """Within 30 seconds of its end, a key ends the stream, and no message is left unanswered."""
    listed = tenant.service.run("keys", "list").stdout.splitlines()
    [line] = [line for line in listed if tenant.project.id in line]
    with streaming(tenant) as stream:
        assert store_one(stream, tenant)
        assert tenant.service.run("keys", "revoke", line.split()[0]).returncode == 0
        revoked_at = time.monotonic()
        while (answer := send_one(stream, tenant)).HasField("response"):
            assert time.monotonic() - revoked_at < SECONDS
            time.sleep(0.5)
        assert answer.status.code == grpc.StatusCode.UNAUTHENTICATED.value[0]
        with pytest.raises(grpc.RpcError):
            stream.read()
        assert stream.call.code() is grpc.StatusCode.UNAUTHENTICATED


def send_one(stream: Stream, tenant: Tenant) -> StreamEventsResponse:
    """Send an event, and return the answer."""
    stream.send(tenant.make_event())
    return stream.read()
