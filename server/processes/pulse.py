"""The sign of life of a process: that its loops turn."""

import time
from collections.abc import Callable

_BEAT_SECONDS = 1.0
# While a loop has stood still for longer than this, there is no beat.
_STILL_SECONDS = 5.0


class Pulse:
    """Calls `on_beat` about every second, as long as all loops turn.

    Each of `turns` returns when a loop has last turned, by the clock.
    """

    def __init__(
        self,
        on_beat: Callable[[], object],
        *turns: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_beat = on_beat
        self._turns = turns
        self._clock = clock
        self._next_at = 0.0

    def check(self) -> None:
        """Beat if it is time and all loops turn; to be called more often than every second."""
        now = self._clock()
        if now >= self._next_at and now - min(turn() for turn in self._turns) < _STILL_SECONDS:
            self._next_at = now + _BEAT_SECONDS
            self._on_beat()
