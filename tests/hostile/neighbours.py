"""Clients that take much and finish little, or send what is dear to read, beside normal ones."""

import gzip
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import grpc

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsRequest
from tests.hostile.connection import Connection, NoAnswer, encode_post
from tests.hostile.grammar import encode_batch, make_event
from tests.hostile.record import Record
from tests.hostile.target import Target
from tests.support.background import repeating
from tests.support.clients import INGEST, bind_ingest
from tests.support.events import to_message
from tests.support.http2 import connected
from tests.support.projects import Project

_PAUSE_SECONDS = 0.05
_ANSWER_SECONDS = 20.0
_MEGABYTE = 1 << 20
# What a worker may keep of bodies, what it may keep of messages, and what else grows a little.
_GROWTH_MB = 135 + 65 + 40
_UNFINISHED_CALLS = 30
_LARGE_AT_ONCE = 4
_DENSE = gzip.compress(b'","' * (10 * _MEGABYTE // 3))

_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def attack_with_idle(target: Target, record: Record, count: float, _seed: int) -> None:
    """Open more connections than there are, and leave them idle or unfinished."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    starts = (b"", b"POST /v1/events HT", b"POST /v1/events HTTP/1.1\r\nHost: x\r\nX-")
    with ExitStack() as stack, _neighbours(target, record):
        for number in range(int(count)):
            connection = socket.create_connection(("127.0.0.1", target.port), _ANSWER_SECONDS)
            stack.enter_context(closing(connection))
            connection.sendall(starts[number % len(starts)])
        time.sleep(1.0)


def attack_with_unfinished(target: Target, record: Record, count: float, _seed: int) -> None:
    """Send bodies and messages almost to their ends, with a key and without."""
    project = target.create_project()
    before = target.read_memory()
    with ExitStack() as stack, _neighbours(target, record):
        for number in range(int(count)):
            key = project.key if number % 2 else "nobody"
            whole = encode_post(b"x" * (_MEGABYTE - 1000), key)
            connection = socket.create_connection(("127.0.0.1", target.port), _ANSWER_SECONDS)
            stack.enter_context(closing(connection))
            connection.sendall(whole[:-1])
        port = int(target.grpc_target.rpartition(":")[2])
        for path in (INGEST, "/grpc.health.v1.Health/Check"):
            client = stack.enter_context(connected(port))
            for _ in range(_UNFINISHED_CALLS):
                stream = client.begin_call(path, {"x-pg-api-key": project.key.encode()})
                client.send_message(stream, b"x" * 9 * _MEGABYTE, size=10 * _MEGABYTE)
        time.sleep(1.0)
        grown = target.read_memory() - before
        record.notes.append(f"a worker has grown by {grown:.0f} MB")
        record.require(grown <= _GROWTH_MB, f"a worker has grown by {grown:.0f} MB")


def attack_with_large(target: Target, record: Record, rounds: float, _seed: int) -> None:
    """Send the largest valid messages over gRPC, four at a time, beside single events."""
    project = target.create_project()
    filler = {"metadata": {"values": [0.5] * 850}}
    events = [to_message(make_event(project.id, number) | filler) for number in range(1000)]
    message = IngestEventsRequest(events=events).SerializeToString()
    record.notes.append(f"messages of {len(message):,} bytes")

    def send(_: int) -> None:
        with grpc.insecure_channel(target.grpc_target) as channel:
            sent = bind_ingest(channel).future(
                message, metadata=(("x-pg-api-key", project.key),), timeout=_ANSWER_SECONDS
            )
            code = sent.code()
        record.add(f"large {code.name}", 0.0)  # it includes the time that the sender took
        fits = code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
        record.require(fits, f"a large message: {code} {sent.details()}")

    with _neighbours(target, record), ThreadPoolExecutor(_LARGE_AT_ONCE) as pool:
        for _ in range(int(rounds)):
            list(pool.map(send, range(_LARGE_AT_ONCE)))


def attack_with_dense(target: Target, record: Record, rounds: float, _seed: int) -> None:
    """Send 10 KB of gzip that hold millions of texts, beside small compressed requests."""
    project = target.create_project()

    def send(_: int) -> None:
        request = encode_post(_DENSE, project.key, b"Content-Encoding: gzip")
        with closing(Connection(target.port)) as connection:
            answer = connection.exchange(request)
        record.add(f"dense {answer.status}", answer.seconds)
        record.require(answer.status in (400, 503), f"dense JSON: {answer}")

    with _neighbours(target, record), ThreadPoolExecutor(_LARGE_AT_ONCE) as pool:
        for _ in range(int(rounds)):
            list(pool.map(send, range(_LARGE_AT_ONCE)))


@contextmanager
def _neighbours(target: Target, record: Record) -> Iterator[None]:
    """Have normal clients ask and send all the while, over new connections: all are answered."""
    neighbours = _Neighbours(target, record)
    with neighbours, ExitStack() as stack:
        for action in (
            neighbours.ask,
            neighbours.post,
            neighbours.post_compressed,
            neighbours.call,
        ):
            stack.enter_context(repeating(action, _PAUSE_SECONDS))
        yield
    record.require(neighbours.count, "no neighbour was answered")


class _Neighbours:
    """Four normal clients: health, a single event as it is, compressed, and over gRPC."""

    def __init__(self, target: Target, record: Record) -> None:
        self.count = 0
        self._target = target
        self._record = record
        self._project: Project = target.create_project()
        self._channel = grpc.insecure_channel(target.grpc_target)
        self._body = encode_batch([make_event(self._project.id, 0)])
        events = [to_message(make_event(self._project.id, 0))]
        self._message = IngestEventsRequest(events=events).SerializeToString()
        self.actions = (self.ask, self.post, self.post_compressed, self.call)

    def __enter__(self) -> "_Neighbours":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def ask(self) -> None:
        """Ask for the health over HTTP."""
        self._exchange("health", 200, _HEALTH)

    def post(self) -> None:
        """Send a single event over HTTP."""
        self._exchange("post", 202, encode_post(self._body, self._project.key))

    def post_compressed(self) -> None:
        """Send a single event as gzip."""
        body = gzip.compress(self._body)
        request = encode_post(body, self._project.key, b"Content-Encoding: gzip")
        self._exchange("gzip", 202, request)

    def call(self) -> None:
        """Send a single event over gRPC."""
        started_at = time.monotonic()
        call = bind_ingest(self._channel).future(
            self._message,
            metadata=(("x-pg-api-key", self._project.key),),
            timeout=_ANSWER_SECONDS,
        )
        code = call.code()
        self._note("call", code is grpc.StatusCode.OK, code.name, time.monotonic() - started_at)

    def _exchange(self, name: str, status: int, request: bytes) -> None:
        try:
            with closing(Connection(self._target.port)) as connection:
                answer = connection.exchange(request)
        except NoAnswer as error:
            self._record.violate(f"a neighbour's {name}: {error}")
            return
        self._note(name, answer.status == status, str(answer.status), answer.seconds)

    def _note(self, name: str, is_good: bool, outcome: str, seconds: float) -> None:
        self.count += 1
        self._record.add(f"{name} {outcome}", seconds)
        self._record.require(is_good, f"a neighbour's {name}: {outcome}")
