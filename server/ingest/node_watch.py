"""Which nodes of a cluster are away, so that nobody waits for them but those who need them."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass

from server.errors import Unavailable
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict, Fault, Refused
from server.storage.nodes import Node, answers, find_nodes, locate_projects

# How long a node may take to answer, and after what pause it is asked again.
_ANSWER_SECONDS, _PAUSE_SECONDS = 1.5, 1.0
# The trial of a node that answers again ends after this time, even if nothing is stored on it.
_TRIAL_SECONDS = 10.0
# Shards move: the node of a project is looked up again after this time.
_PLACES_SECONDS, _LOOK_UP_SECONDS = 5.0, 1.0

_log = logging.getLogger("productgraph.database")


@dataclass(slots=True)
class _Absence:
    """Since when a node is away, and until when it is on trial, once it answers again."""

    since: float
    trial_ends: float = math.inf

    @property
    def is_on_trial(self) -> bool:
        return self.trial_ends < math.inf


class NodeWatch(DatabaseThread):
    """Knows which nodes are away, and asks them once a second; idle if none is.

    One that answers is on trial. It is back as soon as events are stored on it.
    """

    STOP_SECONDS = 2.0

    def __init__(
        self, connection: GuardedConnection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__("nodes", connection)
        self._clock = clock
        self._absences: dict[Node, _Absence] = {}
        self._suspected = False
        self._asked_all_at = -math.inf

    def is_troubled(self) -> bool:
        """Return whether any node is away or on trial."""
        return bool(self._absences)

    def is_away(self, node: Node | None) -> bool:
        """Return whether a node is away, and not on trial; if it is None, whether any is."""
        if node is None:
            return any(not absence.is_on_trial for absence in tuple(self._absences.values()))
        absence = self._absences.get(node)
        return absence is not None and not absence.is_on_trial

    def suspect(self) -> None:
        """Have all nodes asked, unless they have just been."""
        with self._changed:
            if self._clock() >= self._asked_all_at + _PAUSE_SECONDS:
                self._suspected = True
                self._changed.notify()

    def note_failure(self, node: Node, reason: str) -> None:
        """Note that nothing can be stored on a node."""
        with self._changed:
            if node not in self._absences:
                extra = {"node": str(node), "reason": reason}
                _log.warning("a node of the database is away", extra=extra)
            since = self._absences[node].since if node in self._absences else self._clock()
            self._absences[node] = _Absence(since)
            self._changed.notify()

    def note_success(self, node: Node) -> None:
        """Note that events were stored on a node."""
        with self._changed:
            if node in self._absences and self._absences[node].is_on_trial:
                self._end_absence(node)

    def _end_absence(self, node: Node, end: str = "is back") -> None:
        seconds = round(self._clock() - self._absences.pop(node).since, 1)
        extra = {"node": str(node), "seconds": seconds}
        _log.info("a node of the database %s", end, extra=extra)

    def _run_round(self) -> float:
        with self._changed:
            self._changed.wait_for(lambda: self._absences or self._is_urgent())
            self._changed.wait_for(self._is_urgent, _PAUSE_SECONDS)
            asks_all, self._suspected = self._suspected, False
        if not self._stopping.is_set():
            # Who cannot ask knows nothing new: the database itself may be away.
            with suppress(Unavailable):
                self._ask(asks_all)
        return 0.0

    def _is_urgent(self) -> bool:
        return self._suspected or self._stopping.is_set()

    def _ask(self, asks_all: bool) -> None:
        with self._connection.connected(_LOOK_UP_SECONDS) as connection:
            nodes = find_nodes(connection)
        with self._changed:
            for node in self._absences.keys() - set(nodes):
                self._end_absence(node, "no longer belongs to the database")
        for node in nodes:
            if asks_all or node in self._absences:
                self._ask_one(node)
        if asks_all:
            self._asked_all_at = self._clock()

    def _ask_one(self, node: Node) -> None:
        with self._connection.connected(_ANSWER_SECONDS + _LOOK_UP_SECONDS) as connection:
            is_there = answers(connection, node, _ANSWER_SECONDS)
        if not is_there:
            self.note_failure(node, f"no answer within {_ANSWER_SECONDS} s")
            return
        with self._changed:
            absence = self._absences.get(node)
            if absence is None:
                return
            if not absence.is_on_trial:
                absence.trial_ends = self._clock() + _TRIAL_SECONDS
            elif self._clock() >= absence.trial_ends:
                self._end_absence(node)


class Places:
    """Remembers for some seconds which node has a project's events."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[str, Node] = {}
        self._until = -math.inf

    def find(self, link: GuardedConnection, projects: Set[str]) -> Mapping[str, Node]:
        """Return the nodes of projects; of none if they cannot be known. Raises Unavailable."""
        if self._clock() >= self._until:
            self._known, self._until = {}, self._clock() + _PLACES_SECONDS
        if unknown := projects - self._known.keys():
            with suppress(Conflict, Fault, Refused), link.connected(_LOOK_UP_SECONDS) as connection:
                self._known |= locate_projects(connection, unknown)
        return self._known
