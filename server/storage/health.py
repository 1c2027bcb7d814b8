"""The database's health: whether it answers, and deadlines for those who wait for it."""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Self

from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread

_log = logging.getLogger("productgraph.database")


class Watchdog:
    """A thread that runs quick checks every `interval_seconds`, above all of deadlines.

    A process has one: its wake-ups are most of what an idle process costs, about 0.1 ms each.
    """

    def __init__(self, *checks: Callable[[], object], interval_seconds: float = 0.05) -> None:
        self._checks = list(checks)
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def watch(self, *checks: Callable[[], object]) -> None:
        """Run these from now on, too."""
        self._checks += checks

    def _run(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            for check in self._checks:
                try:
                    check()
                except Exception:  # noqa: BLE001 - the dog outlives whatever a check does
                    _log.exception("a watchdog's check failed")


class Readiness(DatabaseThread):
    """Whether the database answered a query within the last two seconds."""

    MAX_AGE_SECONDS = 2.0
    STOP_SECONDS = 2.0
    _INTERVAL_SECONDS = 0.5

    def __init__(
        self, connection: GuardedConnection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__("readiness", connection)
        self._clock = clock
        self._answered_at = -math.inf

    def is_ready(self) -> bool:
        """Return whether to send requests here: not once the service shuts down. Never waits."""
        fresh = self._clock() - self._answered_at < self.MAX_AGE_SECONDS
        return fresh and not self._stopping.is_set()

    def withdraw(self) -> None:
        """Be unready from now on."""
        self._stopping.set()

    def _run_round(self) -> float:
        if self._connection.wait_until_available(self._stopping):
            self._answered_at = self._clock()
        return self._INTERVAL_SECONDS
