"""The campaigns of volume: many small inputs over HTTP, gRPC and the bare port."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random

import grpc

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from tests.hostile import bodies, messages, streams
from tests.hostile.connection import Connection, NoAnswer
from tests.hostile.record import LIMIT_SECONDS, Record
from tests.hostile.target import Target
from tests.support.background import repeating
from tests.support.clients import bind_ingest

_CLIENTS = 8
# Numbers of events, so far apart that no two clients share one.
_STRIDE = 10_000_000
# After its first tenth, a campaign may let a worker grow so far: by the rejected events that wait
# to be kept, which are 16 MB at the most and take 50 MB of the heap, and a little for the rest.
_GROWTH_MB = 50.0 + 20.0

# Sends this many inputs from one client; called with the client's number.
Send = Callable[[int, int], None]


def attack_bodies(target: Target, record: Record, count: int, seed: int) -> None:
    """Send bodies over HTTP; what was accepted of the events that can be counted is stored."""
    counted, other = target.create_project(), target.create_project()
    accepted = _Sum()

    def send(client: int, share: int) -> None:
        random = Random(f"{seed} bodies {client}")
        grammar = bodies.BodyGrammar(random, client * _STRIDE, counted, other)
        connection = Connection(target.port)
        for _ in range(share):
            case = grammar()
            try:
                answer = connection.exchange(case.request)
            except NoAnswer as error:
                record.violate(f"{error} to {case.request[-300:]!r}")
                continue
            record.add(answer.status, answer.seconds)
            if problem := bodies.find_problem(case, answer):
                record.violate(f"{problem} to {case.request[-300:]!r}: {answer.body[:200]!r}")
            elif case.odd is not None:
                accepted.add(answer.json["accepted"])
        connection.close()

    _run(target, record, count, send)
    stored = target.count_events(counted)
    record.require(stored == accepted.value, f"{accepted.value} accepted, {stored} stored")


def attack_messages(target: Target, record: Record, count: int, seed: int) -> None:
    """Send requests over gRPC; what was accepted of the events that can be counted is stored."""
    counted, other = target.create_project(), target.create_project()
    accepted = _Sum()

    def send(client: int, share: int) -> None:
        random = Random(f"{seed} messages {client}")
        grammar = messages.MessageGrammar(random, client * _STRIDE, counted, other)
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(target.grpc_target, options) as channel:
            ingest = bind_ingest(channel)
            for _ in range(share):
                call = grammar()
                accepted.add(_call(ingest, call, record))

    _run(target, record, count, send)
    stored = target.count_events(counted)
    record.require(stored == accepted.value, f"{accepted.value} accepted, {stored} stored")


def _call(
    ingest: "grpc.UnaryUnaryMultiCallable[bytes, IngestEventsResponse]",
    call: messages.Call,
    record: Record,
) -> int:
    """Return how many of the events that can be counted were accepted."""
    metadata = () if call.key is None else (("x-pg-api-key", call.key),)
    started_at, response = time.monotonic(), IngestEventsResponse()
    try:
        response = ingest(call.request, timeout=2 * LIMIT_SECONDS, metadata=metadata)
        code, text = "OK", ""
    except grpc.RpcError as error:
        code, text = error.code().name, str(error.details())
    record.add(code, time.monotonic() - started_at)
    if code not in call.codes:
        record.violate(f"answered {code}, {text!r}, to {call.request[:300]!r}")
    if call.odd is None:
        return 0
    errors: list[object] = [{"index": error.index} for error in response.errors]
    if problem := bodies.describe_outcome(response.accepted, errors, call.size, call.odd):
        record.violate(f"{problem}: {call.request[:300]!r}")
    return response.accepted


def attack_port(target: Target, record: Record, count: int, seed: int) -> None:
    """Send byte streams to the HTTP port."""

    def send(client: int, share: int) -> None:
        grammar = streams.StreamGrammar(Random(f"{seed} streams {client}"))
        for _ in range(share):
            stream = grammar()
            try:
                statuses, seconds = streams.send_stream(target.port, stream)
            except OSError as error:
                record.violate(f"{type(error).__name__} after {stream.content[:300]!r}")
                continue
            record.add(" ".join(map(str, sorted(set(statuses)))) or "closed", max(0.0, seconds))
            if problem := streams.find_problem(stream, statuses):
                record.violate(f"{problem}: {stream.content[:300]!r}")

    _run(target, record, count, send)


class _Sum:
    """Counts from several threads."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.value += number


def _run(target: Target, record: Record, count: int, send: Send) -> None:
    """Share the inputs between clients, in two parts; memory must not grow after the first."""
    first = max(1, count // 10 // _CLIENTS)
    with probing_health(target, record):
        _send_shares(record, 0, first, send)
        before = target.read_memory()
        _send_shares(record, _CLIENTS, max(1, count // _CLIENTS - first), send)
    grown = target.read_memory() - before
    record.require(grown <= _GROWTH_MB, f"a worker has grown by {grown:.0f} MB")


def _send_shares(record: Record, first_client: int, share: int, send: Send) -> None:
    def guarded(client: int) -> None:
        try:
            send(client, share)
        except Exception as error:  # noqa: BLE001 - a client that fails must not go unnoticed
            record.violate(f"client {client}: {type(error).__name__}: {error}")

    with ThreadPoolExecutor(_CLIENTS) as pool:
        for client in range(first_client, first_client + _CLIENTS):
            pool.submit(guarded, client)


@contextmanager
def probing_health(target: Target, record: Record) -> Iterator[None]:
    """Ask for /health four times a second over new connections; each must answer in time."""

    def probe() -> None:
        connection = Connection(target.port)
        try:
            answer = connection.exchange(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        except NoAnswer as error:
            record.violate(f"/health: {error}")
        else:
            record.require(answer.status == 200, f"/health answered {answer.status}")
            record.require(answer.seconds < LIMIT_SECONDS, f"/health: {answer.seconds:.1f} s")
        connection.close()

    with repeating(probe, 0.25):
        yield
