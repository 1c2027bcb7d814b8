"""Watches over projects: which keys are about to end, and how much of the quotas is used."""

from collections.abc import Sequence
from contextlib import suppress

from server.errors import Unavailable
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict
from server.storage.keys import count_ending
from server.storage.quotas import Share, list_shares

_INTERVAL_SECONDS = 15.0
_QUERY_SECONDS = 5.0


class ProjectsMonitor(DatabaseThread):
    """Asks the database every few seconds, over a connection that it keeps only meanwhile."""

    STOP_SECONDS = 0.0

    def __init__(self, connection: GuardedConnection) -> None:
        super().__init__("projects monitor", connection)
        self._ending: int | None = None
        self._shares: Sequence[Share] = ()

    def count_ending(self) -> int | None:
        """Return how many keys were about to end a moment ago, or None if that is unknown."""
        return self._ending

    def list_shares(self) -> Sequence[Share]:
        """Return how much of the quotas was used a moment ago; nothing if that is unknown."""
        return self._shares

    def _note_cut(self) -> None:
        self._ending, self._shares = None, ()

    def _run_round(self) -> float:
        self._ending, self._shares = self._ask()
        self._connection.close()
        return _INTERVAL_SECONDS

    def _ask(self) -> tuple[int | None, Sequence[Share]]:
        # A failure is seen by the absence of the figures; who needs the database logs it.
        with suppress(Conflict, Unavailable), self._connection.connected(_QUERY_SECONDS) as opened:
            return count_ending(opened), list_shares(opened)
        return None, ()
