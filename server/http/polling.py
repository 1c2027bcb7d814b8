"""The waiting of the HTTP server's loop, at a cost that does not grow with idle connections.

wasyncore's loop asks every connection in each round what it waits for, and the kernel for each of
them: with 128 connections that takes a tenth of a request's time. Here the kernel remembers, and
only connections are asked to which something has happened.
"""

import select
import time
from collections import deque
from typing import Any

from waitress import wasyncore

_READ, _WRITE = select.EPOLLIN | select.EPOLLPRI, select.EPOLLOUT
# How often all connections are asked: for what happens to one without a mark, as when it is to be
# closed because it was idle.
_SWEEP_SECONDS = 1.0


class Connections(dict[int, Any]):
    """wasyncore's map of descriptors to what reads and writes them, with its own way to wait."""

    def __init__(self) -> None:
        super().__init__()
        self._poll = select.epoll()
        self._waited_for: dict[int, int] = {}
        self._marked: deque[int] = deque()
        self._sweep_at = 0.0

    def __setitem__(self, descriptor: int, connection: Any) -> None:
        super().__setitem__(descriptor, connection)
        self.mark(descriptor)

    def __delitem__(self, descriptor: int) -> None:
        """Forget a connection that is about to be closed; its descriptor will be another's."""
        super().__delitem__(descriptor)
        self._wait_for(descriptor, 0)

    def mark(self, descriptor: int | None) -> None:
        """Have a connection asked what it waits for, if it is open; from any thread."""
        if descriptor is not None:
            self._marked.append(descriptor)

    def run_once(self, seconds: float, *, sweep: bool = False) -> None:
        """Wait for something to happen, and handle it."""
        now = time.monotonic()
        if sweep or now >= self._sweep_at:
            self._sweep_at = now + _SWEEP_SECONDS
            self._marked.extend(self)
        while self._marked:
            self._ask(self._marked.popleft())
        for descriptor, events in self._poll.poll(seconds):
            connection = self.get(descriptor)
            if connection is None:  # closed by what happened to another one
                continue
            if not (connection.readable() or connection.writable()):
                self._wait_for(descriptor, 0)  # until it is marked
                continue
            wasyncore.readwrite(connection, events)
            self.mark(descriptor)

    def close(self) -> None:
        """End the waiting."""
        self._poll.close()

    def _ask(self, descriptor: int) -> None:
        connection = self.get(descriptor)
        if connection is None:
            return
        wanted = _READ if connection.readable() else 0
        if connection.writable() and not connection.accepting:
            wanted |= _WRITE
        # While a request is answered, its connection is left as it is: most clients wait.
        if wanted or self._waited_for.get(descriptor) != _READ:
            self._wait_for(descriptor, wanted)

    def _wait_for(self, descriptor: int, wanted: int) -> None:
        known = self._waited_for.get(descriptor, 0)
        if wanted == known:
            return
        if not wanted:
            del self._waited_for[descriptor]
            self._poll.unregister(descriptor)
            return
        self._waited_for[descriptor] = wanted
        if known:
            self._poll.modify(descriptor, wanted)
        else:
            self._poll.register(descriptor, wanted)
