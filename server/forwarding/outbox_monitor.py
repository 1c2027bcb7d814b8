"""How forwarding stands, asked of the database now and then for whoever watches."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from server.errors import Unavailable
from server.storage.connection import Conflict, Link
from server.storage.outbox import LaneStatus, read_status

_INTERVAL_SECONDS = 5.0
# The longer the outbox, the longer it takes to count it: so many times as long it is left alone.
_REST = 20
_QUERY_SECONDS = 10.0

_log = logging.getLogger("productgraph.monitor")


class OutboxMonitor:
    """A thread that reads the state of the lanes every few seconds."""

    def __init__(self, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock
        self._lanes: Sequence[LaneStatus] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def start(self) -> None:
        """Starts reading."""
        self._thread.start()

    def lanes(self) -> Sequence[LaneStatus] | None:
        """How the lanes stood a moment ago; None where that could not be read. Never waits."""
        return self._lanes

    def check(self) -> None:
        """For the watchdog: cuts a query that hangs."""
        if self._link.cut_if_overdue():
            self._lanes = None

    def stop(self) -> None:
        """Ends once the query that runs is over."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = self._clock()
            self._lanes = self._read()
            took = self._clock() - began
            self._stop.wait(max(_INTERVAL_SECONDS, _REST * took))
        self._link.close()

    def _read(self) -> Sequence[LaneStatus] | None:
        try:
            with self._link.connected(_QUERY_SECONDS) as connection:
                return read_status(connection)
        except (Conflict, Unavailable):
            pass  # seen by its absence, and logged by those who need the database
        except Exception:  # noqa: BLE001 - the thread outlives whatever happens
            _log.exception("the outbox cannot be read")
        return None
