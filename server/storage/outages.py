"""Outages of the database in the log of a process: one line for the start, one for the end."""

import logging
import threading
import time
from collections.abc import Callable, Hashable

from server.storage.errors import Obstacle

_log = logging.getLogger("productgraph.database")


class OutageLog:
    """Knows which connections of a process fail at the moment; the outage lasts while any does."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failing: set[Hashable] = set()
        self._obstacles: set[tuple[str, str, int]] = set()
        self._began_at = 0.0

    def note_failure(self, connection: Hashable, cause: BaseException | None) -> None:
        """Note that a connection cannot be used; log it if it is the first.

        An obstacle is logged instead, with its server, and also if the outage has begun before.
        """
        with self._lock:
            is_first = not self._failing
            self._failing.add(connection)
            if is_first:
                self._obstacles.clear()
                self._began_at = self._clock()
        if isinstance(cause, Obstacle):
            self._note_obstacle(cause)
        elif is_first:
            _log.warning("the database is unavailable", exc_info=cause)

    def _note_obstacle(self, obstacle: Obstacle) -> None:
        known = (str(obstacle), obstacle.host, obstacle.port)
        with self._lock:
            is_new = known not in self._obstacles
            self._obstacles.add(known)
        if is_new:
            place = {"database_host": obstacle.host, "database_port": obstacle.port}
            _log.warning(str(obstacle), extra=place)

    def note_success(self, connection: Hashable) -> None:
        """Note that a connection works; log the end if it was the last that failed."""
        if connection not in self._failing:
            return
        with self._lock:
            self._failing.discard(connection)
            is_over = not self._failing
            seconds = round(self._clock() - self._began_at, 1)
        if is_over:
            _log.info("the database is available again", extra={"seconds": seconds})
