"""How near keys are to their ends, asked of the database now and then for whoever watches."""

from contextlib import suppress
from dataclasses import dataclass

from server.errors import Unavailable
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict
from server.storage.keys import count_ending

_INTERVAL_SECONDS = 15.0
_QUERY_SECONDS = 5.0


@dataclass(frozen=True)
class LimitsStatus:
    """How many keys end soon though they are in use."""

    ending_keys: int


class LimitsMonitor(DatabaseThread):
    """Reads the status every few seconds, over a connection that it keeps only meanwhile."""

    STOP_SECONDS = 0.0

    def __init__(self, connection: GuardedConnection) -> None:
        super().__init__("limits", connection)
        self._status: LimitsStatus | None = None

    def read(self) -> LimitsStatus | None:
        """Return the status of a moment ago, or None if that is unknown. Never waits."""
        return self._status

    def _note_cut(self) -> None:
        self._status = None

    def _run_round(self) -> float:
        self._status = self._ask()
        self._connection.close()
        return _INTERVAL_SECONDS

    def _ask(self) -> LimitsStatus | None:
        # A failure is seen by the absence of the figures; who needs the database logs it.
        with suppress(Conflict, Unavailable), self._connection.connected(_QUERY_SECONDS) as opened:
            return LimitsStatus(count_ending(opened))
        return None
