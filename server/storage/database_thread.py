"""The one way to work in the background with a connection of one's own."""

import logging
import threading
from typing import ClassVar, Self

from server.storage.connection import GuardedConnection

_PAUSE_AFTER_FAILURE_SECONDS = 1.0

_log = logging.getLogger("productgraph.threads")


class DatabaseThread:
    """A thread with a connection of its own, which runs while its context lasts.

    It repeats `_run_round` until it is told to stop, and outlives whatever a round raises.
    """

    # How long `stop` waits for the last round.
    STOP_SECONDS: ClassVar[float]

    def __init__(self, name: str, connection: GuardedConnection) -> None:
        self._connection = connection
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Cut a query that hangs. For the watchdog."""
        if self._connection.cut_if_overdue():
            self._note_cut()

    def stop(self) -> None:
        """End the thread after its round; wait for that, but not longer than STOP_SECONDS."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(self.STOP_SECONDS)

    def _run_round(self) -> float:
        """Do what is due; return for how many seconds to pause then."""
        raise NotImplementedError

    def _has_work(self) -> bool:
        """Return whether something is left to do before the thread may end."""
        return False

    def _finish(self) -> None:
        """Settle what is left when the thread ends."""

    def _note_cut(self) -> None:
        """Answer those who wait for the query that was cut. Called by the watchdog."""

    def _run(self) -> None:
        while not self._stopping.is_set() or self._has_work():
            try:
                pause = self._run_round()
            except Exception:  # noqa: BLE001 - the thread outlives whatever happens
                _log.exception("a round failed", extra={"thread": self._thread.name})
                pause = _PAUSE_AFTER_FAILURE_SECONDS
            if pause > 0:
                self._stopping.wait(pause)
        self._finish()
        self._connection.close()
