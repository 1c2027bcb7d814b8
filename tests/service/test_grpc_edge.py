"""The gRPC edge under clients that are careless, slow or hostile."""

from contextlib import ExitStack

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.clients import INGEST, Tenant, accepted, bind_ingest, encode_request
from tests.support.events import to_message
from tests.support.http2 import END_STREAM, HEADERS, connected
from tests.support.services import Service, wait_until

MEGABYTE = 1 << 20
HEALTH = "/grpc.health.v1.Health/Check"


def find_port(service: Service) -> int:
    """Return the number of the gRPC port."""
    return int(service.grpc_target.rpartition(":")[2])


@pytest.mark.parametrize(
    "key", [b"", b"nobody", b"pgk_" + b"a" * 32], ids=["none", "bad", "unknown"]
)
def test_a_key_is_checked_before_the_message(key: bytes, service: Service) -> None:
    """Without a valid key, a call is answered before any of its message has arrived."""
    with connected(find_port(service)) as client:
        stream = client.begin_call(INGEST, {"x-pg-api-key": key})
        assert b"16" in client.wait_for_end(stream)


def test_metadata_that_is_no_text_is_not_logged(service: Service) -> None:
    """A key with a byte that is no UTF-8 is refused, and neither it nor a traceback is logged."""
    size = service.log.stat().st_size
    with connected(find_port(service)) as client:
        stream = client.begin_call(INGEST, {"x-pg-api-key": b"pgk_secretsecret\xff", "a": b"\xfe"})
        assert b"16" in client.wait_for_end(stream)
    written = service.log.read_bytes()[size:]
    assert b"secretsecret" not in written
    assert b"Traceback" not in written
    assert b"Invalid encoding" not in written


@pytest.mark.slow
@pytest.mark.parametrize("path", [INGEST, HEALTH])
def test_unfinished_messages_take_little_memory(path: str, tenant: Tenant) -> None:
    """However many large messages a client leaves unfinished, few of them are kept."""
    (worker,) = tenant.service.find_workers()
    before = worker.memory_info().rss
    with ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(connected(find_port(tenant.service)))
            for _ in range(12):
                stream = client.begin_call(path, {"x-pg-api-key": tenant.project.key.encode()})
                client.send_message(stream, b"x" * (9 * MEGABYTE), size=10 * MEGABYTE, patience=0.2)
        assert worker.memory_info().rss - before < 90 * MEGABYTE


def test_unfinished_messages_make_way_for_others(tenant: Tenant) -> None:
    """A message of a sender whose others never arrive is taken, and one of those is refused."""
    with connected(find_port(tenant.service)) as client:
        key = {"x-pg-api-key": tenant.project.key.encode()}
        streams = [client.begin_call(INGEST, key) for _ in range(10)]
        for stream in streams:
            client.send_message(stream, b"x" * 10, size=1000)
        assert tenant.ingest([to_message(tenant.make_event())]) == accepted(1)
        ended = next(
            frame
            for frame in client.frames()
            if frame.kind == HEADERS and frame.flags & END_STREAM and frame.stream in streams
        )
        assert b"14" in ended.payload


def test_a_call_without_a_message_is_refused(tenant: Tenant) -> None:
    """A call that ends before it has sent a message is told so."""
    with connected(find_port(tenant.service)) as client:
        key = {"x-pg-api-key": tenant.project.key.encode()}
        stream = client.begin_call(INGEST, key)
        client.end_call(stream)
        assert b"request: missing" in client.wait_for_end(stream)


def test_a_message_of_the_largest_size_is_taken(tenant: Tenant) -> None:
    """A large message is read in a thread, and accepted like any other."""
    events = [event | {"page.path": "/" * 1000} for event in tenant.make_events(1000)]
    assert tenant.ingest(map(to_message, events)) == accepted(1000)
    assert len(encode_request(map(to_message, events))) > MEGABYTE


@pytest.mark.parametrize("seconds", [0.25, 0.1])
def test_calls_with_a_short_deadline_can_succeed(seconds: float, tenant: Tenant) -> None:
    """A call whose client waits for a quarter of a second or less is answered in that time."""
    request = encode_request([to_message(tenant.make_event())])
    key = (("x-pg-api-key", tenant.project.key),)
    with grpc.insecure_channel(tenant.service.grpc_target) as channel:
        ingest = bind_ingest(channel)
        codes: list[grpc.StatusCode] = []

        def is_answered() -> bool:
            calling = ingest.future(request, timeout=seconds, metadata=key)
            codes.append(calling.code())
            return codes[-1] is grpc.StatusCode.OK and calling.result().accepted == 1

        # A busy machine may be too slow for some of them, and says so.
        wait_until(is_answered)
    too_late = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert set(codes[:-1]) <= too_late
    assert len(tenant.read_rows()) == 1


def test_health_is_answered_beside_unfinished_checks(service: Service) -> None:
    """Checks of health that never arrive do not keep another one from its answer."""
    with ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(connected(find_port(service)))
            for _ in range(4):
                stream = client.begin_call(HEALTH, {})
                client.send_message(stream, b"x", size=MEGABYTE)
        channel = stack.enter_context(grpc.insecure_channel(service.grpc_target))
        answer = channel.unary_unary(HEALTH, bytes, bytes)(b"", timeout=30)
        assert answer == b"\x08\x01"


def describe(service: Service, symbol: str) -> list[str]:
    """Return the names of the files that reflection sends for a symbol, its own first."""
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    with grpc.insecure_channel(service.grpc_target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        [answer] = stub.ServerReflectionInfo(iter([asked]), timeout=30)
    files = answer.file_descriptor_response.file_descriptor_proto
    return [FileDescriptorProto.FromString(file).name for file in files]


@pytest.mark.parametrize(
    ("symbol", "file"),
    [
        ("EventIngestionService", "event_ingestion_service"),
        ("EventIngestionService.IngestEvents", "event_ingestion_service"),
        ("IngestEventsRequest", "event_ingestion_service"),
        ("Event.event_id", "event"),
    ],
)
def test_reflection_describes_every_kind_of_symbol(
    symbol: str, file: str, service: Service
) -> None:
    """The file of a service, method, message or field is found by its full name."""
    found = describe(service, f"productgraph.v1.{symbol}")
    assert found[0] == f"productgraph/v1/{file}.proto"


@pytest.mark.parametrize("symbol", ["EventIngestionService.Nothing", "Event.nothing", "Nothing"])
def test_reflection_knows_no_symbol_that_is_missing(symbol: str, service: Service) -> None:
    """A name that stands for nothing is not found, though what it begins with is."""
    assert describe(service, f"productgraph.v1.{symbol}") == []
