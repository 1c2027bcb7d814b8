"""When a request must be answered."""

import math
import time
from collections.abc import Callable

from server.errors import Unavailable


class Deadline:
    """A moment on a clock; whoever does a part of a request's work asks it what time is left."""

    __slots__ = ("_clock", "at")

    def __init__(self, at: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.at = at
        self._clock = clock

    def left(self) -> float:
        """Return the seconds until the deadline; negative once it has passed."""
        return self.at - self._clock()

    def check(self, extra: float = 0.0) -> None:
        """Raise Unavailable if work that takes `extra` seconds would end too late.

        The request has waited for others: doing its work as well would make the next ones late.
        """
        if extra >= self.left():
            raise Unavailable("not answered in time")


NEVER = Deadline(math.inf)
