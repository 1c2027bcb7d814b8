"""Bodies that are still on their way: what they take together is bounded."""

import threading
from collections import Counter
from io import BytesIO
from typing import Protocol

from server.errors import Unavailable

# In memory or, beyond a size, on disk. It has room for a dozen of the largest bodies.
_MAX_HELD_BYTES = 128 << 20


class DroppedBody:
    """Takes the bytes of a body that nobody wants, and keeps none of them."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def append(self, data: bytes) -> None:
        """Count bytes that have arrived."""
        self._length += len(data)

    def getfile(self) -> BytesIO:
        """Return what is left of the body: nothing."""
        return BytesIO()

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


class Holder(Protocol):
    """A request whose body is held."""

    headers: dict[str, str]
    completed: bool
    held_bytes: int
    budget: "BodyBudget | None"

    def refuse_body(self, error: BaseException) -> None:
        """Drop the body, including what is still to come, and answer with this error."""


class BodyBudget:
    """Bounds the bytes of all bodies that are held: large ones, and those that are unfinished.

    What is too much is taken from the sender that holds most, so that nobody takes the others'
    room: its oldest unfinished request is refused.
    """

    def __init__(self, max_bytes: int = _MAX_HELD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held: dict[Holder, None] = {}  # in the order of their arrival
        self._total_bytes = 0
        self._lock = threading.RLock()

    def note(self, request: Holder, size: int) -> None:
        """Take note of how much is held of a body; refuses one if it is too much in all."""
        with self._lock:
            request.budget = self
            self._held[request] = None
            self._total_bytes += size - request.held_bytes
            request.held_bytes = size
            while self._total_bytes > self._max_bytes and (victim := self._find_victim()):
                victim.refuse_body(Unavailable("too many large requests at once"))
                self.release(victim)

    def release(self, request: Holder) -> None:
        """Take note that nothing is held of a body any more."""
        with self._lock:
            if request in self._held:
                del self._held[request]
                self._total_bytes -= request.held_bytes
                request.held_bytes = 0

    def _find_victim(self) -> Holder | None:
        unfinished = [request for request in self._held if not request.completed]
        held_by: Counter[str] = Counter()
        for request in unfinished:
            held_by[_sender_of(request)] += request.held_bytes
        if not held_by:
            return None
        [(worst, _)] = held_by.most_common(1)
        return next(request for request in unfinished if _sender_of(request) == worst)


def _sender_of(request: Holder) -> str:
    return request.headers.get("X_PG_API_KEY", "")
