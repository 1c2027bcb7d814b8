"""Group commit: whatever arrives while a commit is in flight shares the next one.

A database that takes less than arrives would be given ever larger groups, the oldest requests
first, and all their answers would come too late. So a group is no larger than what it took within
a second lately, and what it cannot take in time is refused at once.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from server.deadline import Deadline
from server.errors import IngestError, Internal, Unavailable
from server.events.copy_rows import Row
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict, Fault, RowLocked
from server.storage.events import EventStore
from server.wakeups import gathered_wakeups

# A request whose outcome is still unknown is answered this long before its deadline, but never
# spends more than this share of its time on that.
_MARGIN_SECONDS, _MARGIN_SHARE = 0.25, 0.25
# A commit is given this long even when a request in it has less time left.
_SHORTEST_COMMIT_SECONDS = 1.0
_GROUP_BYTES = 16 << 20
# A group takes so long where the database is slow, unless it is smaller than these bytes; from such
# a group on, and from such a time, the speed of the database is known.
_GROUP_SECONDS = 1.0
_TELLING_BYTES, _TELLING_SECONDS = 32 << 10, 0.25
# Of the time that a request has left, so much may be used up by what waits before it: the rest is
# for its own group, and for a database that gets slower meanwhile.
_WAITING_SHARE = 0.7
# How long a group waits for a row that another transaction holds, before the one request with that
# row is found: twice what a commit usually takes, within these bounds. That one waits longer, and
# the others with it: both together stay below half a second.
_LOCK_COMMITS, _SHORTEST_LOCK_SECONDS, _LONGEST_LOCK_SECONDS = 2.0, 0.05, 0.15
_ALONE_FACTOR = 2.0
# Each kind of failure that is a single request's is logged once in this time.
_LOG_SECONDS = 60.0

_log = logging.getLogger("productgraph.writer")


@dataclass(slots=True, eq=False)
class Batch:
    """The rows of one request, and when it must have its answer."""

    rows: Sequence[Row]
    size: int
    answer_by: float
    stored: Future[None] = field(default_factory=Future)

    def settle(self, error: IngestError | None = None) -> None:
        """Answers the request, unless it has been answered."""
        with suppress(InvalidStateError):
            if error is None:
                self.stored.set_result(None)
            else:
                self.stored.set_exception(error)


class _Pace:
    """How many bytes a second the database takes, where it is slow enough to matter."""

    def __init__(self) -> None:
        self._rate = math.inf
        self._usual_seconds = 0.0

    def learn(self, size: int, seconds: float) -> None:
        """Take note of a commit."""
        self._usual_seconds += 0.1 * (seconds - self._usual_seconds)
        rate = size / max(seconds, 1e-6)
        is_telling = size >= _TELLING_BYTES and seconds >= _TELLING_SECONDS
        if is_telling or rate > self._rate:
            self._rate = rate

    def seconds_for(self, size: float) -> float:
        """How long so many bytes take."""
        return size / self._rate

    def group_bytes(self) -> float:
        """How large a group may be."""
        return min(_GROUP_BYTES, max(_TELLING_BYTES, self._rate * _GROUP_SECONDS))

    def lock_seconds(self) -> float:
        """Return how long to wait for a row that another transaction holds."""
        wait = _LOCK_COMMITS * self._usual_seconds
        return min(_LONGEST_LOCK_SECONDS, max(_SHORTEST_LOCK_SECONDS, wait))


class _FailureLog:
    """Logs what fails single requests: each kind once in a while, with how often it happened."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts: dict[str, int] = {}
        self._silent_until: dict[str, float] = {}

    def note(self, error: Exception) -> None:
        """Log a request's failure, or count it for the next time."""
        kind = f"{type(error).__name__} {getattr(error, 'code', '')}".strip()
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._clock() >= self._silent_until.get(kind, -math.inf):
            self._silent_until[kind] = self._clock() + _LOG_SECONDS
            self._counts[kind] = 0
            extra = {"kind": kind, "count": count}
            _log.error("a request could not be stored", exc_info=error, extra=extra)


class Writer(DatabaseThread):
    """One thread that stores what all requests of the process hand in, one group at a time.

    `on_group` is told the rows and bytes of each group that was committed.
    """

    STOP_SECONDS = 5.0

    def __init__(
        self,
        connection: GuardedConnection,
        store: EventStore,
        *,
        max_waiting_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        on_group: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__("writer", connection)
        self._store = store
        self.needs_encoded = store.needs_encoded
        self._max_waiting_bytes = max_waiting_bytes
        self._clock = clock
        self._on_group = on_group
        self._waiting: deque[Batch] = deque()
        self._waiting_bytes = 0
        self._in_flight: list[Batch] = []
        self._busy_until = -math.inf
        self._pace = _Pace()
        self._failures = _FailureLog(clock)
        self._available = True

    def submit(self, rows: Sequence[Row], deadline: Deadline) -> Future[None]:
        """Hands rows in; the future is done once they are committed, or fails by `deadline`.

        `deadline` is on the writer's clock. Raises Unavailable at once where the database is away
        or too much is waiting. After a failure the rows may have been stored all the same.
        """
        size = sum(len(row.text) for row in rows)
        margin = min(_MARGIN_SECONDS, _MARGIN_SHARE * deadline.left())
        batch = Batch(rows, size, deadline.at - margin)
        with self._changed:
            if not self._available or self._stopping.is_set():
                raise Unavailable("storage is unavailable")
            if self._waiting_bytes + size > self._max_waiting_bytes:
                raise Unavailable("too many events are waiting to be stored")
            deadline.check(margin + self._estimate_seconds(size))
            self._waiting.append(batch)
            self._waiting_bytes += size
            self._changed.notify()
        return batch.stored

    def backlog(self) -> tuple[int, int]:
        """How many batches wait for a group to be in, and their bytes."""
        return len(self._waiting), self._waiting_bytes

    def _estimate_seconds(self, size: int) -> float:
        """Return how long a batch may take until it is stored.

        No time if nothing else is to be stored, so that a better pace is noticed.
        """
        if not (self._waiting or self._in_flight):
            return 0.0
        wait = self._pace.seconds_for(self._waiting_bytes + size)
        return max(0.0, self._busy_until - self._clock()) + wait / _WAITING_SHARE

    def check(self) -> None:
        """For the watchdog: answers those whose time is up, and cuts a commit that hangs."""
        now = self._clock()
        with self._changed:
            overdue = [batch for batch in self._waiting if now >= batch.answer_by]
        for batch in (*overdue, *self._in_flight):
            if now >= batch.answer_by:
                batch.settle(Unavailable("not stored in time"))
        super().check()

    def _note_cut(self) -> None:
        self._fail(self._in_flight)

    def _has_work(self) -> bool:
        return bool(self._waiting)

    def _run_round(self) -> float:
        group = self._take_group()
        try:
            if group:
                self._store_group(group)
        except Exception:  # noqa: BLE001 - whatever happens, these requests are answered
            _log.exception("a group could not be stored")
            _settle(group, Internal())
        if not self._available:
            self._available = self._connection.wait_until_available(self._stopping)
        return 0.0

    def _take_group(self) -> list[Batch]:
        """Wait for batches to store together; none if the database is away, or at the end."""
        with self._changed:
            self._in_flight = []
            # A commit may be cut in the moment of its success, and nobody submits after that.
            self._changed.wait_for(
                lambda: self._waiting or self._stopping.is_set() or not self._available
            )
            self._in_flight = self._pop_group()
            return self._in_flight

    def _pop_group(self) -> list[Batch]:
        group: list[Batch] = []
        size, now, limit = 0, self._clock(), self._pace.group_bytes()
        # All of a group are answered at once: what would be stored for nothing is left out.
        expected = self._pace.seconds_for(min(limit, self._waiting_bytes))
        while self._waiting and size < limit:
            batch = self._waiting.popleft()
            self._waiting_bytes -= batch.size
            is_alone = not (group or self._waiting)
            if batch.answer_by <= now + (0.0 if is_alone else expected):
                batch.settle(Unavailable("not stored in time"))
            elif not batch.stored.done():
                group.append(batch)
                size += batch.size
        self._busy_until = now + self._pace.seconds_for(size)
        return group

    def _store_group(self, group: list[Batch], *, others_wait: bool = False) -> None:
        try:
            self._save(group, others_wait=others_wait)
        except Unavailable as error:
            _log.debug("a group was not stored", exc_info=error.__cause__ or error)
            self._fail(group)
        except Exception as error:  # noqa: BLE001 - whatever it is, it fails no request but its own
            if len(group) > 1:
                self._store_one_by_one(group)
            else:
                self._failures.note(error)
                group[0].settle(_choose_answer(error))
        else:
            _settle(group)
            if self._on_group is not None:
                self._on_group(
                    sum(len(batch.rows) for batch in group), sum(batch.size for batch in group)
                )

    def _store_one_by_one(self, group: Sequence[Batch]) -> None:
        for batch in group:
            if not self._available:
                batch.settle(Unavailable("storage is unavailable"))
            elif not batch.stored.done():
                self._store_group([batch], others_wait=True)

    def _save(self, group: list[Batch], *, others_wait: bool) -> None:
        rows = group[0].rows if len(group) == 1 else [row for each in group for row in each.rows]
        size = sum(batch.size for batch in group)
        earliest, started_at = min(batch.answer_by for batch in group), self._clock()
        expected = min(self._pace.seconds_for(size), _GROUP_SECONDS)
        until = max(earliest, started_at + _SHORTEST_COMMIT_SECONDS + expected)
        lock_seconds = self._pace.lock_seconds() * (_ALONE_FACTOR if len(group) == 1 else 1.0)
        while True:
            seconds = until - self._clock()
            try:
                with self._connection.connected(seconds) as connection:
                    self._store.save(connection, rows, seconds, min(lock_seconds, seconds / 2))
                self._pace.learn(size, self._clock() - started_at)
                return
            except RowLocked:  # which one request alone can wait for, until another one comes
                if others_wait or len(group) > 1 or self._waiting or self._clock() >= until:
                    raise
                self._stopping.wait(_SHORTEST_LOCK_SECONDS)
            except Conflict:  # with a table's lock, among others, for which all have to wait
                lock_seconds *= 2
                if self._clock() >= until:
                    raise Unavailable("not stored in time") from None

    def _fail(self, group: list[Batch]) -> None:
        """Answers everyone now, and whoever comes until the database is back."""
        with self._changed:
            self._available = False
            waiting, self._waiting = self._waiting, deque()
            self._waiting_bytes = 0
            self._changed.notify()
        _settle([*group, *waiting], Unavailable("storage is unavailable"))


def _choose_answer(error: Exception) -> IngestError:
    """Return what the one request is told that could not be stored though others can."""
    if isinstance(error, RowLocked):
        return Unavailable("another transaction holds one of these events")
    if isinstance(error, Fault) and error.is_internal:
        return Unavailable("the database failed to store these events")
    return Internal()


def _settle(group: Sequence[Batch], error: IngestError | None = None) -> None:
    with gathered_wakeups():
        for batch in group:
            batch.settle(error)
