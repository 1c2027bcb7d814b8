"""Connections that send a byte now and then, while others go on as usual."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import quantiles

from tests.hostile.connection import Connection, NoAnswer, encode_post
from tests.hostile.grammar import encode_batch, make_event
from tests.hostile.record import Record
from tests.hostile.target import Target
from tests.support.background import repeating
from tests.support.projects import Project

_CONNECTIONS = 200
_CLIENTS = 4
_DRIP_SECONDS = 1.0
# Measured in alternation so often; a machine that is busy with something else spoils one or two.
_WINDOWS = 5
_SLOWDOWN = 2.0
_TRIES = 3
_GROWTH_MB = 20.0


def attack_slowly(target: Target, record: Record, seconds: float, _seed: int) -> None:
    """Compare normal clients' 99th percentile with and without 200 dripping connections."""
    project = target.create_project()
    clients = _Clients(target, record, project)
    clients.run(seconds)  # warm
    before = target.read_memory()
    for _ in range(_TRIES):
        alone, beside = _alternate(target, clients, seconds)
        if beside <= _SLOWDOWN * alone:
            break
    record.notes.append(f"p99 {alone * 1000:.1f} ms alone, {beside * 1000:.1f} ms beside them")
    record.require(beside <= _SLOWDOWN * alone, "normal clients' p99 is more than twice as high")
    grown = target.read_memory() - before
    record.require(grown <= _GROWTH_MB, f"a worker has grown by {grown:.0f} MB")


def _alternate(target: Target, clients: "_Clients", seconds: float) -> tuple[float, float]:
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(_WINDOWS):
        alone += clients.run(seconds)
        with dripping(target.port, _CONNECTIONS):
            beside += clients.run(seconds)
    return quantiles(alone, n=100)[98], quantiles(beside, n=100)[98]


@contextmanager
def dripping(port: int, count: int) -> Iterator[None]:
    """Open this many connections that send a head or a body, one byte a second."""
    head = b"POST /v1/events HTTP/1.1\r\nHost: x\r\n"
    starts = (b"", b"P", head, head + b"Content-Length: 10000\r\n\r\n")
    sockets = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(count)]
    for number, connection in enumerate(sockets):
        connection.sendall(starts[number % len(starts)])

    def drip() -> None:
        sockets.append(connection := sockets.pop(0))
        connection.sendall(b"x")

    try:
        with repeating(drip, _DRIP_SECONDS / count):
            yield
    finally:
        for connection in sockets:
            connection.close()


class _Clients:
    """Normal clients: a batch of ten events each, one after the other."""

    def __init__(self, target: Target, record: Record, project: Project) -> None:
        self._target = target
        self._record = record
        self._project = project
        self._number = 0
        self._lock = threading.Lock()

    def run(self, seconds: float) -> list[float]:
        """Return the latencies of all requests during this time."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(_CLIENTS) as pool:
            runs = [pool.submit(self._run_one, until) for _ in range(_CLIENTS)]
        return [latency for run in runs for latency in run.result()]

    def _run_one(self, until: float) -> list[float]:
        connection, latencies = Connection(self._target.port), []
        while time.monotonic() < until:
            request = encode_post(encode_batch(self._make_events()), self._project.key)
            try:
                answer = connection.exchange(request)
            except NoAnswer as error:
                self._record.violate(f"a normal client: {error}")
                continue
            self._record.add(answer.status, answer.seconds)
            self._record.require(answer.status == 202, f"a normal client: {answer}")
            latencies.append(answer.seconds)
        connection.close()
        return latencies

    def _make_events(self) -> list[dict[str, object]]:
        with self._lock:
            first, self._number = self._number, self._number + 10
        return [make_event(self._project.id, first + index) for index in range(10)]
