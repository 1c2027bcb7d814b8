"""How many keys are about to end, asked of the database now and then for whoever watches."""

from contextlib import suppress

from server.errors import Unavailable
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict
from server.storage.keys import count_ending

_INTERVAL_SECONDS = 15.0
_QUERY_SECONDS = 5.0


class KeysMonitor(DatabaseThread):
    """Counts them every few seconds, over a connection that it keeps only meanwhile."""

    STOP_SECONDS = 0.0

    def __init__(self, connection: GuardedConnection) -> None:
        super().__init__("keys monitor", connection)
        self._ending: int | None = None

    def count_ending(self) -> int | None:
        """Return their number a moment ago, or None if that is unknown. Never waits."""
        return self._ending

    def _note_cut(self) -> None:
        self._ending = None

    def _run_round(self) -> float:
        self._ending = self._ask()
        self._connection.close()
        return _INTERVAL_SECONDS

    def _ask(self) -> int | None:
        # A failure is seen by the absence of the figure; who needs the database logs it.
        with suppress(Conflict, Unavailable), self._connection.connected(_QUERY_SECONDS) as opened:
            return count_ending(opened)
        return None
