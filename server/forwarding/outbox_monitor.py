"""How forwarding stands, asked of the database now and then for whoever watches."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from server.errors import Unavailable
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict
from server.storage.lanes import LaneStatus, read_status

_INTERVAL_SECONDS = 5.0
# The longer the outbox, the longer it takes to count it: so many times as long it is left alone.
_REST = 20
_QUERY_SECONDS = 10.0


class OutboxMonitor(DatabaseThread):
    """Reads the state of the lanes every few seconds."""

    STOP_SECONDS = 0.0

    def __init__(
        self, connection: GuardedConnection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__("monitor", connection)
        self._clock = clock
        self._lanes: Sequence[LaneStatus] | None = None

    def lanes(self) -> Sequence[LaneStatus] | None:
        """Return how the lanes stood a moment ago, or None if that is unknown. Never waits."""
        return self._lanes

    def _note_cut(self) -> None:
        self._lanes = None

    def _run_round(self) -> float:
        began = self._clock()
        self._lanes = self._read()
        return max(_INTERVAL_SECONDS, _REST * (self._clock() - began))

    def _read(self) -> Sequence[LaneStatus] | None:
        # A failure is seen by the absence of the figures; who needs the database logs it.
        with suppress(Conflict, Unavailable), self._connection.connected(_QUERY_SECONDS) as opened:
            return read_status(opened)
        return None
