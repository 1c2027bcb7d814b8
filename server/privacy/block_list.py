"""The blocked persons, whose events are dropped, in the memory of a process."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Self

from server.errors import Unavailable
from server.events.copy_rows import Row
from server.events.persons import EventIds, RowIds, read_ids
from server.privacy.digests import Digests
from server.storage.blocked_persons import (
    ListState,
    count_unrecognised,
    read_blocked,
    read_state,
)
from server.storage.connection import Connection, GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import DatabaseError

# A change is in force within this time and a query.
_REFRESH_SECONDS = 5.0
_RETRY_SECONDS = 0.5
# On each twelfth refresh the list is read even if it seems unchanged.
_REFRESHES_PER_READ = 12
_QUERY_SECONDS = 10.0
_START_SECONDS = 2.0

_log = logging.getLogger("productgraph.privacy")


class BlockedPersons:
    """The blocked persons of one project."""

    def __init__(self, digests: Digests, project_id: str, blocked: set[bytes], rows: RowIds):
        self._digests = digests
        self._project_id = project_id
        self._blocked = blocked
        self._rows = rows

    def own_row(self, row: Row) -> bool:
        """Return whether a row that is to be stored belongs to a blocked person."""
        return self._own(self._rows.read(row))

    def may_own(self, protocol: str, event: bytes) -> bool:
        """Return whether an event, as received, belongs to a blocked person or cannot be read."""
        ids = read_ids(protocol, event)
        return None in ids or self._own(ids)

    def _own(self, ids: EventIds) -> bool:
        user, anonymous = ids
        if user and self._digests.of_user(self._project_id, user) in self._blocked:
            return True
        if not anonymous:
            return False
        return self._digests.of_anonymous(self._project_id, anonymous) in self._blocked


# Returns the blocked persons of a project, or None if it has none.
FindBlocked = Callable[[str], BlockedPersons | None]


def find_nobody(_project_id: str) -> None:
    """Return that a project has no blocked persons."""


def load_blocked(
    connection: Connection, digests: Digests, rows: RowIds
) -> Mapping[str, BlockedPersons]:
    """Return the blocked persons of each project that has any."""
    return {
        project_id: BlockedPersons(digests, project_id, blocked, rows)
        for project_id, blocked in read_blocked(connection, digests.mark).items()
    }


def check_recognised(connection: Connection, digests: Digests | None) -> None:
    """Raise DatabaseError if somebody is blocked who cannot be recognised by these digests."""
    mark = None if digests is None else digests.mark
    if count := count_unrecognised(connection, mark):
        raise DatabaseError(
            f"{count} ids of persons are blocked under another PRIVACY_SECRET, or it is missing:"
            " their events cannot be recognised"
        )


class BlockList(DatabaseThread):
    """Knows the blocked persons of all projects, and learns of changes within seconds."""

    STOP_SECONDS = 2.0

    def __init__(self, connection: GuardedConnection, digests: Digests, rows: RowIds) -> None:
        super().__init__("blocked", connection)
        self._digests = digests
        self._rows = rows
        self._blocked: Mapping[str, BlockedPersons] | None = None
        self._state: ListState | None = None
        self._refreshes = 0
        self._loaded = threading.Event()

    def __enter__(self) -> Self:
        super().__enter__()
        self._loaded.wait(_START_SECONDS)
        return self

    def find(self, project_id: str) -> BlockedPersons | None:
        """Return the blocked persons of a project, or None if it has none.

        Raises Unavailable until the list has been read once; nothing could be stored before either.
        """
        if self._blocked is None:
            raise Unavailable("the blocked persons are not known yet")
        return self._blocked.get(project_id)

    def _run_round(self) -> float:
        try:
            with self._connection.connected(_QUERY_SECONDS) as connection:
                self._refresh(connection)
        except Unavailable as error:
            _log.debug("blocked persons cannot be read now", exc_info=error.__cause__)
            return _RETRY_SECONDS
        return _REFRESH_SECONDS

    def _refresh(self, connection: Connection) -> None:
        state = read_state(connection)
        self._refreshes += 1
        if state != self._state or self._refreshes % _REFRESHES_PER_READ == 0:
            self._blocked = load_blocked(connection, self._digests, self._rows)
            self._state = state
            self._loaded.set()
