"""Three times as many events as the database can take."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count as counting

from tests.hostile.bombs import MAX_MEMORY_MB
from tests.hostile.connection import Connection, NoAnswer, encode_post
from tests.hostile.grammar import encode_batch, make_event
from tests.hostile.record import LIMIT_SECONDS, Record
from tests.hostile.target import Target
from tests.hostile.volume import probing_health
from tests.support.patience import PATIENCE
from tests.support.projects import Project

_EVENTS = 20
_CLIENTS = 8
_FACTOR = 3
_LEAST_SHARE = 0.8 / PATIENCE
_RECOVERY_SECONDS = 5.0 * PATIENCE
_NORMAL_SECONDS = 1.0 * PATIENCE
# Every row takes the database so long: the limit is the same on every machine.
_SLOW_DOWN = """
CREATE FUNCTION slow_down() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_sleep(0.001); RETURN NEW; END';
CREATE TRIGGER slow_down BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION slow_down();
"""
_SPEED_UP = "DROP FUNCTION slow_down CASCADE"


def attack_with_load(target: Target, record: Record, seconds: float, _seed: int) -> None:
    """Check that answers are 202 or 503 in time, and that as much is stored as without overload."""
    load = _Load(target.create_project(), record)
    with slow_database(target), probing_health(target, record):
        peak = load.measure_peak(target.port, min(15.0, max(3.0, seconds / 4)))
        target.reset_peak_memory()
        rate = asyncio.run(load.run(target.port, _FACTOR * peak, seconds))
        memory = target.read_peak_memory()
        recovery = load.measure_recovery(target.port)
    record.peak_memory_mb = memory
    record.notes.append(
        f"peak {peak:.0f} events/s, under overload {rate:.0f}, normal after {recovery:.1f} s"
    )
    record.require(rate >= _LEAST_SHARE * peak, f"{rate:.0f} of {peak:.0f} events/s under overload")
    record.require(memory <= MAX_MEMORY_MB, f"a worker took {memory:.0f} MB")
    record.require(recovery <= _RECOVERY_SECONDS, f"normal only after {recovery:.1f} s")
    stored = target.count_events(load.project)
    record.require(stored >= load.accepted, f"{load.accepted} accepted, {stored} stored")


@contextmanager
def slow_database(target: Target) -> Iterator[None]:
    """Run a database that takes a millisecond for each row, over each connection."""
    target.execute(_SLOW_DOWN)
    try:
        yield
    finally:
        target.execute(_SPEED_UP)


@dataclass
class _Load:
    """Requests with new events; counts the events that were accepted."""

    project: Project
    record: Record
    accepted: int = 0
    _numbers: Iterator[int] = field(default_factory=counting)

    def measure_peak(self, port: int, seconds: float) -> float:
        """Return the most events a second that are accepted while few are waiting."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(_CLIENTS) as pool:
            counts = list(pool.map(lambda _: self._repeat(port, until), range(_CLIENTS)))
        self.accepted += sum(counts)
        return sum(counts) / seconds

    def _repeat(self, port: int, until: float) -> int:
        connection, accepted = Connection(port), 0
        while time.monotonic() < until:
            try:
                answer = connection.exchange(self._encode_request())
            except NoAnswer as error:
                self.record.violate(f"below the peak: {error}")
                continue
            self.record.require(answer.status == 202, f"below the peak: {answer}")
            accepted += _EVENTS * (answer.status == 202)
        connection.close()
        return accepted

    async def run(self, port: int, events_per_second: float, seconds: float) -> float:
        """Send at this rate whatever is answered. Return the accepted events a second."""
        before, idle, tasks = self.accepted, list[_Stream](), set[asyncio.Task[None]]()
        started_at = time.monotonic()
        for number in range(int(seconds * events_per_second / _EVENTS)):
            due = started_at + number * _EVENTS / events_per_second
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            tasks.add(task := asyncio.create_task(self._send(port, idle)))
            task.add_done_callback(tasks.discard)
        rate = (self.accepted - before) / (time.monotonic() - started_at)
        await asyncio.gather(*tasks)
        for _, writer in idle:
            writer.close()
        return rate

    async def _send(self, port: int, idle: "list[_Stream]") -> None:
        try:
            async with asyncio.timeout(4 * LIMIT_SECONDS):
                stream = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
                started_at = time.monotonic()
                head, closes = await _exchange(stream, self._encode_request())
        except (OSError, asyncio.IncompleteReadError) as error:
            self.record.violate(f"{type(error).__name__}: {error}")
            return
        status = int(head[9:12])
        self.record.add(status, time.monotonic() - started_at)
        self.accepted += _EVENTS * (status == 202)
        is_due = status == 202 or (status == 503 and b"retry-after:" in head.lower())
        self.record.require(is_due, f"answered {head!r}")
        stream[1].close() if closes else idle.append(stream)

    def measure_recovery(self, port: int) -> float:
        """Return how long it takes until a request is stored as quickly as before."""
        connection, started_at = Connection(port), time.monotonic()
        while (now := time.monotonic()) < started_at + 4 * _RECOVERY_SECONDS:
            try:
                answer = connection.exchange(self._encode_request())
            except NoAnswer as error:
                self.record.violate(f"after the overload: {error}")
                continue
            self.accepted += _EVENTS * (answer.status == 202)
            if answer.status == 202 and answer.seconds < _NORMAL_SECONDS:
                break
            time.sleep(0.05)
        connection.close()
        return now - started_at

    def _encode_request(self) -> bytes:
        events = [make_event(self.project.id, next(self._numbers)) for _ in range(_EVENTS)]
        return encode_post(encode_batch(events), self.project.key)


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _exchange(stream: _Stream, request: bytes) -> tuple[bytes, bool]:
    """Return the head of the answer, and whether the connection ends with it."""
    reader, writer = stream
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.lower().splitlines()[1:-1])
    await reader.readexactly(int(fields[b"content-length"]))
    return head, fields.get(b"connection") == b"close"
