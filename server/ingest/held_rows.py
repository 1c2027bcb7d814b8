"""Rows that a transaction may hold for long, since it waits for a node that is away."""

import math
from collections.abc import Callable, Iterable

from server.events.copy_rows import Row

# Each try to store some keeps all others waiting for a moment.
_PAUSE_SECONDS = 1.0


class HeldRows:
    """Tells which requests to store apart from all others, and when to try them again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._identities: set[object] = set()
        self._next_try = -math.inf

    def add(self, rows: Iterable[Row]) -> None:
        """Note rows that may be held."""
        self._identities.update(row.identity for row in rows)

    def remove(self, rows: Iterable[Row]) -> None:
        """Note rows that are not held."""
        if self._identities:
            self._identities.difference_update(row.identity for row in rows)

    def has(self, rows: Iterable[Row]) -> bool:
        """Return whether any of the rows may be held."""
        return bool(self._identities) and any(row.identity in self._identities for row in rows)

    def may_be_tried(self) -> bool:
        """Return whether it is time to try again to store what was held."""
        return self._clock() >= self._next_try

    def postpone(self) -> None:
        """Note that some were still held."""
        self._next_try = self._clock() + _PAUSE_SECONDS

    def clear(self) -> None:
        """Forget all rows."""
        self._identities.clear()
