"""More than the database takes: what it cannot store in time is refused, the rest is stored."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from typing import cast

import pytest

from server.deadline import Deadline
from server.errors import Unavailable
from server.events.copy_rows import Row
from server.ingest.group_commit import Writer
from server.storage.connection import GuardedConnection
from server.storage.events import EventStore
from tests.support.clock import Clock

SECONDS = 5.0
BYTES_PER_SECOND = 100_000
BATCH_BYTES = 50_000


class SlowStore:
    """Takes so many bytes a second by the clock, and begins only when it is let."""

    needs_encoded = False
    is_distributed = False

    def __init__(self, clock: Clock) -> None:
        self.groups: list[int] = []
        self.may_begin = threading.Event()
        self.may_begin.set()
        self.begun = threading.Event()
        self._clock = clock

    def save(self, _connection: object, rows: Sequence[Row], *_seconds: float) -> None:
        """Store rows nowhere."""
        self.begun.set()
        assert self.may_begin.wait(30)
        self.groups.append(sum(len(row.text) for row in rows))
        self._clock.now += self.groups[-1] / BYTES_PER_SECOND

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep what is handed in meanwhile waiting."""
        self.may_begin.clear()
        self.begun.clear()
        yield
        self.may_begin.set()


class StandingLink:
    """Stands in for a link that never breaks."""

    def open_another(self) -> "StandingLink":
        """Itself."""
        return self

    def connected(self, _seconds: float) -> "nullcontext[None]":
        """No connection, which the store does not need."""
        return nullcontext()

    def close(self) -> None:
        """Nothing."""


@pytest.fixture
def clock() -> Clock:
    """Return the clock of writer and store."""
    return Clock(100.0)


@pytest.fixture
def store(clock: Clock) -> SlowStore:
    """Return the store of `writer`."""
    return SlowStore(clock)


@pytest.fixture
def writer(clock: Clock, store: SlowStore) -> Iterator[Writer]:
    """Provide a running writer, which has learnt how slow its store is."""
    link, slow = cast(GuardedConnection, StandingLink()), cast(EventStore, store)
    with Writer(link, slow, max_waiting_bytes=1 << 30, clock=clock) as writer:
        submit(writer, clock, 2 * BATCH_BYTES).result(60)
        yield writer


def submit(
    writer: Writer, clock: Clock, size: int = BATCH_BYTES, seconds: float = SECONDS
) -> "Future[None]":
    """Hands in one row of so many bytes, to be stored within so many seconds."""
    return writer.submit(
        [Row(("project", 0, "event"), "x" * size)], Deadline(clock.now + seconds, clock)
    )


def fill(writer: Writer, store: SlowStore, clock: Clock) -> "list[Future[None]]":
    """Hands in batches until one is refused, the first of which keeps the store busy."""
    accepted = [submit(writer, clock)]
    assert store.begun.wait(10)
    with suppress(Unavailable):
        while len(accepted) < 100:
            accepted.append(submit(writer, clock))
    return accepted


def test_only_what_can_be_stored_in_time_is_accepted(
    writer: Writer, store: SlowStore, clock: Clock
) -> None:
    """As much is accepted as can be stored before its deadline, and all of that is."""
    with store.busy():
        accepted = fill(writer, store, clock)
    assert SECONDS / 2 < len(accepted) * BATCH_BYTES / BYTES_PER_SECOND < SECONDS
    for future in accepted:
        future.result(60)


def test_nothing_is_stored_too_late(writer: Writer, store: SlowStore, clock: Clock) -> None:
    """A request that the others of its group would make late is refused, and not stored."""
    with store.busy():
        first = submit(writer, clock)
        assert store.begun.wait(10)
        hasty = submit(writer, clock, BATCH_BYTES // 2, seconds=1.6)
        others = [submit(writer, clock) for _ in range(3)]
    for future in (first, *others):
        future.result(60)
    with pytest.raises(Unavailable):
        hasty.result(60)
    assert sum(store.groups) == (2 + 1 + 3) * BATCH_BYTES


def test_no_group_takes_much_more_than_a_second(
    writer: Writer, store: SlowStore, clock: Clock
) -> None:
    """No group takes much more than a second, however much waits."""
    with store.busy():
        accepted = fill(writer, store, clock)
    for future in accepted:
        future.result(60)
    assert max(store.groups) < 2 * BYTES_PER_SECOND


def test_a_slow_past_is_forgotten_when_idle(writer: Writer, clock: Clock) -> None:
    """Where nothing else waits, even what is thought to take too long is tried."""
    submit(writer, clock, 10 * int(SECONDS) * BYTES_PER_SECOND).result(60)
