"""Keeps rejected events, by a thread and a connection that ingestion never waits for."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Concatenate, ParamSpec

from productgraph.v1.event_ingestion_service_pb2 import EventError
from server.config import RejectedKeep
from server.errors import Unavailable
from server.events.batch import ParsedBatch
from server.storage.connection import Connection, GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict
from server.storage.rejected_events import (
    KEPT_WITHIN_SECONDS,
    MAX_EVENT_BYTES,
    Rejection,
    delete_expired,
    delete_surplus,
    find_crowded_projects,
    insert_rejections,
)

# What may wait to be kept; beyond it, events are counted and dropped.
MAX_WAITING = 10_000
_MAX_WAITING_BYTES = 16 << 20
# One transaction, and how many times as long the rest behind it takes: a flood of rejected events
# is written at a pace that the others do not feel, the busier they are the slower.
_GROUP, _GROUP_BYTES = 100, 1 << 18
_REST = 25
_TRIM_SECONDS = 10.0
_RETRY_SECONDS = 2.0
_QUERY_SECONDS = 10.0
# A rejection that has waited longer is dropped, so that a deletion knows when none can follow.
_LONGEST_WAIT = timedelta(seconds=KEPT_WITHIN_SECONDS - 3 * _QUERY_SECONDS)

P = ParamSpec("P")

_log = logging.getLogger("productgraph.rejected")


class _Backlog:
    """What waits to be kept, within its limits: half of each is left to other projects."""

    def __init__(self) -> None:
        self._rejections: deque[Rejection] = deque()
        self._count_of: Counter[str] = Counter()
        self._bytes_of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._rejections)

    def has_room(self, project_id: str) -> bool:
        return (
            len(self._rejections) < MAX_WAITING
            and self._bytes_of.total() < _MAX_WAITING_BYTES
            and self._count_of[project_id] < MAX_WAITING // 2
            and self._bytes_of[project_id] < _MAX_WAITING_BYTES // 2
        )

    def append(self, rejection: Rejection) -> None:
        self._rejections.append(rejection)
        self._count_of[rejection.project_id] += 1
        self._bytes_of[rejection.project_id] += len(rejection.event)

    def drop_older(self, cut: datetime) -> int:
        """Drop the rejections that were received before `cut`; return their number."""
        older = list(takewhile(lambda each: each.received_at < cut, self._rejections))
        self.remove(older)
        return len(older)

    def first(self) -> list[Rejection]:
        """As many as are written at a time."""
        group: list[Rejection] = []
        size = 0
        for rejection in islice(self._rejections, _GROUP):
            size += len(rejection.event)
            group.append(rejection)
            if size >= _GROUP_BYTES:
                break
        return group

    def remove(self, group: Sequence[Rejection]) -> None:
        """Take off what `first` returned."""
        for rejection in group:
            self._rejections.popleft()
            self._bytes_of[rejection.project_id] -= len(rejection.event)
        self._count_of -= Counter(rejection.project_id for rejection in group)
        self._bytes_of = +self._bytes_of  # without those that have none left


class RejectionWriter(DatabaseThread):
    """Writes what validation rejected to its table, and keeps that table short.

    `on_dropped` is told now and then how many were too many to be kept.
    """

    STOP_SECONDS = 2.0

    def __init__(
        self,
        connection: GuardedConnection,
        keep: RejectedKeep,
        clock: Callable[[], float] = time.monotonic,
        on_dropped: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__("rejected", connection)
        self._keep = keep
        self._clock = clock
        self._on_dropped = on_dropped
        self._backlog = _Backlog()
        self._dropped = 0
        # The projects that may have too many rows by now; None: any, as those of another setting.
        self._grown: set[str] | None = None
        self._trim_at = clock()

    def record(self, project_id: str, batch: ParsedBatch, errors: Sequence[EventError]) -> None:
        """Take the events of a batch that these errors are of. Must not wait for the database."""
        now = datetime.now(UTC)
        with self._changed:
            for position, error in enumerate(errors):
                if not self._backlog.has_room(project_id):
                    self._dropped += len(errors) - position
                    break
                event, reason = batch.received(error.index), error.error
                if event is None:
                    continue
                kept = event[:MAX_EVENT_BYTES]
                self._backlog.append(
                    Rejection(project_id, now, batch.protocol, reason, len(event), kept)
                )
            self._changed.notify()

    def _has_work(self) -> bool:
        return bool(self._backlog)

    def _run_round(self) -> float:
        group = self._wait_for_group()
        began = self._clock()
        try:
            self._write(group)
            if self._clock() >= self._trim_at:
                self._trim()
        except (Conflict, Unavailable) as error:
            level = logging.WARNING if isinstance(error, Conflict) else logging.DEBUG
            _log.log(level, "rejected events cannot be kept now", exc_info=error.__cause__)
            if self._stopping.is_set():
                self._drop_backlog()
            return _RETRY_SECONDS
        return _REST * (self._clock() - began)

    def _finish(self) -> None:
        self._tell_dropped()

    def _drop_backlog(self) -> None:
        with self._changed:
            self._dropped += len(self._backlog)
            self._backlog = _Backlog()

    def _wait_for_group(self) -> list[Rejection]:
        """Return what is to be written next; nothing if it is time to trim."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._backlog or self._stopping.is_set(),
                max(0.0, self._trim_at - self._clock()),
            )
            self._dropped += self._backlog.drop_older(datetime.now(UTC) - _LONGEST_WAIT)
            return self._backlog.first()

    def _write(self, group: Sequence[Rejection]) -> None:
        if not group:
            return
        try:
            with self._connection.connected(_QUERY_SECONDS) as connection:
                insert_rejections(connection, group)
        except (Conflict, Unavailable):
            raise  # tried again
        except Exception:  # noqa: BLE001 - what can never be kept must not hold up the others
            _log.exception("rejected events were not kept")
        self._remove(group)
        if self._grown is not None:
            self._grown.update(rejection.project_id for rejection in group)

    def _remove(self, group: Sequence[Rejection]) -> None:
        with self._changed:
            self._backlog.remove(group)

    def _trim(self) -> None:
        self._trim_at = self._clock() + _TRIM_SECONDS
        self._tell_dropped()
        self._repeat(delete_expired, datetime.now(UTC) - timedelta(seconds=self._keep.seconds))
        for project_id in self._find_grown():
            self._repeat(delete_surplus, project_id, self._keep.count)
        self._grown = set()

    def _find_grown(self) -> Collection[str]:
        if self._grown is not None:
            return self._grown
        with self._connection.connected(_QUERY_SECONDS) as connection:
            return find_crowded_projects(connection, self._keep.count)

    def _repeat(
        self, delete: "Callable[Concatenate[Connection, P], int]", *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Delete a little at a time, until there is no more."""
        while not self._stopping.is_set():
            with self._connection.connected(_QUERY_SECONDS) as connection:
                if not delete(connection, *args, **kwargs):
                    return

    def _tell_dropped(self) -> None:
        with self._changed:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            _log.warning(
                "rejected events were not kept, there were too many", extra={"count": dropped}
            )
            if self._on_dropped is not None:
                self._on_dropped(dropped)
