"""Group commit: whatever arrives while a commit is in flight shares the next one.

A database that takes less than arrives would be given ever larger groups, the oldest requests
first, and all their answers would come too late. So a group is no larger than what it took within
a second lately, and what it cannot take in time is refused at once.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from server.deadline import Deadline
from server.errors import IngestError, Internal, Unavailable
from server.events.copy_rows import Row
from server.ingest.held_rows import HeldRows
from server.ingest.node_watch import NodeWatch, Places
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict, Fault, NodeFailed, RowLocked
from server.storage.events import EventStore
from server.storage.nodes import Node
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
# A commit that takes longer may wait for a node that is away.
_SUSPICIOUS_SECONDS = 0.5
_HELD = "another transaction holds one of these events"
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

    @property
    def project_id(self) -> str:
        """Return the project of all rows."""
        return self.rows[0].identity[0] if self.rows else ""

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
        self._nodes = NodeWatch(connection.open_another(), clock)
        self._places = Places(clock)
        self._held = HeldRows(clock)
        # Since when what is stored, and on which node, if it is one node's.
        self._saving: tuple[float, Node | None] = (math.inf, None)

    def __enter__(self) -> Self:
        self._nodes.__enter__()
        return super().__enter__()

    def stop(self) -> None:
        """End the thread once all is stored that waits, and then that of the nodes."""
        super().stop()
        self._nodes.stop()

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
        self._nodes.check()
        if self._store.is_distributed:
            self._check_nodes(now)

    def _check_nodes(self, now: float) -> None:
        """Have the nodes asked if a commit takes long; break it off if it waits for a lost one."""
        since, node = self._saving
        if now - since < _SUSPICIOUS_SECONDS:
            return
        if self._nodes.is_away(node):
            self._connection.break_off(_SUSPICIOUS_SECONDS)
        else:
            self._nodes.suspect()

    def _note_cut(self) -> None:
        self._fail(self._in_flight)

    def _has_work(self) -> bool:
        return bool(self._waiting)

    def _run_round(self) -> float:
        group = self._take_group()
        try:
            if group and self._nodes.is_troubled():
                self._store_apart(group)
            elif group:
                self._held.clear()
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

    def _store_apart(self, group: Sequence[Batch]) -> None:
        """Store the batches of each node by themselves, but refuse those of one that is away."""
        try:
            parts = self._split(group)
        except Unavailable:
            self._fail(group)
            return
        self._store_parts(parts, are_located=True)

    def _store_parts(
        self, parts: Sequence[tuple[Node | None, Sequence[Batch]]], *, are_located: bool
    ) -> None:
        for node, part in parts:
            left = [batch for batch in part if not batch.stored.done()]
            if not self._available:
                _settle(left, Unavailable("storage is unavailable"))
            elif node is not None and self._nodes.is_away(node):
                _settle(left, NodeFailed("it is away"))
            elif left:
                self._store_group(left, node, is_located=are_located, others_wait=len(parts) > 1)

    def _split(self, group: Sequence[Batch]) -> list[tuple[Node | None, list[Batch]]]:
        """Return the batches of each node, those with held rows apart; alone if it is unknown."""
        nodes = self._places.find(self._connection, {batch.project_id for batch in group})
        parts: dict[Hashable, tuple[Node | None, list[Batch]]] = {}
        for batch in group:
            node, is_held = nodes.get(batch.project_id), self._held.has(batch.rows)
            if is_held and not self._held.may_be_tried():
                batch.settle(Unavailable(_HELD))
            else:
                key = batch if node is None else (node, is_held)
                parts.setdefault(key, (node, []))[1].append(batch)
        return list(parts.values())

    def _store_group(
        self,
        group: Sequence[Batch],
        node: Node | None = None,
        *,
        is_located: bool = False,
        others_wait: bool = False,
    ) -> None:
        try:
            self._save(group, node, others_wait=others_wait)
        except NodeFailed as error:
            if is_located:
                self._refuse(group, node, error)
            else:
                self._held.add(_list_rows(group))  # its transaction may still wait for the node
                self._store_apart(group)
        except Unavailable as error:
            _log.debug("a group was not stored", exc_info=error.__cause__ or error)
            self._fail(group)
        except Exception as error:  # noqa: BLE001 - whatever it is, it fails no request but its own
            are_held = isinstance(error, RowLocked) and self._held.has(_list_rows(group))
            if len(group) > 1 and not are_held:
                alone = [(node, [batch]) for batch in group]
                self._store_parts(alone, are_located=is_located)
            else:
                if isinstance(error, RowLocked) and node is not None:
                    self._held.add(_list_rows(group))
                    self._held.postpone()
                self._failures.note(error)
                _settle(group, _choose_answer(error))
        else:
            self._note_stored(group, node)

    def _note_stored(self, group: Sequence[Batch], node: Node | None) -> None:
        _settle(group)
        if node is not None:
            self._nodes.note_success(node)
            self._held.remove(_list_rows(group))
        if self._on_group is not None:
            self._on_group(
                sum(len(batch.rows) for batch in group), sum(batch.size for batch in group)
            )

    def _refuse(self, part: Sequence[Batch], node: Node | None, error: NodeFailed) -> None:
        """Answer those who need a node that failed."""
        if node is not None:
            self._nodes.note_failure(node, error.reason)
        else:
            self._failures.note(error)
        _settle(part, error)

    def _save(self, group: Sequence[Batch], node: Node | None, *, others_wait: bool) -> None:
        rows = _list_rows(group)
        size = sum(batch.size for batch in group)
        earliest, started_at = min(batch.answer_by for batch in group), self._clock()
        expected = min(self._pace.seconds_for(size), _GROUP_SECONDS)
        until = max(earliest, started_at + _SHORTEST_COMMIT_SECONDS + expected)
        lock_seconds = self._pace.lock_seconds() * (_ALONE_FACTOR if len(group) == 1 else 1.0)
        while True:
            seconds = until - self._clock()
            self._saving = (self._clock(), node)
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
            finally:
                self._saving = (math.inf, None)

    def _fail(self, group: Sequence[Batch]) -> None:
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
        return Unavailable(_HELD)
    if isinstance(error, Fault) and error.is_internal:
        return Unavailable("the database failed to store these events")
    return Internal()


def _list_rows(group: Sequence[Batch]) -> Sequence[Row]:
    return group[0].rows if len(group) == 1 else [row for batch in group for row in batch.rows]


def _settle(group: Sequence[Batch], error: IngestError | None = None) -> None:
    with gathered_wakeups():
        for batch in group:
            batch.settle(error)
