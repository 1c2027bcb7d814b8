"""The lifeline between a worker and its parent: one socket pair.

Over it the worker reports that it is ready, and then again and again that it does not hang. Its end
of file tells the worker that the parent is gone.
"""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

# Names the variable that holds the descriptor of the worker's end.
LIFELINE = "PRODUCTGRAPH_LIFELINE"


class Lifeline:
    """The worker's end of the connection to its parent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @classmethod
    def from_environment(cls) -> "Lifeline":
        """Take over what the parent handed down. Raises KeyError outside a worker."""
        connection = socket.socket(fileno=int(os.environ.pop(LIFELINE)))
        connection.set_inheritable(False)
        return cls(connection)

    @classmethod
    def find(cls) -> "Lifeline | None":
        """Return what the parent handed down, or None if this process has no such parent."""
        return cls.from_environment() if LIFELINE in os.environ else None

    def report_ready(self) -> None:
        """Tell the parent that this worker serves; call it once both servers listen."""
        with suppress(ConnectionError):  # the parent is gone, which on_parent_exit deals with
            self._connection.sendall(b"ready\n")

    def report_beat(self) -> None:
        """Tell the parent that this worker does not hang; never waits."""
        with suppress(BlockingIOError, ConnectionError):  # the parent may hang or be gone
            self._connection.send(b".", socket.MSG_DONTWAIT)

    def on_parent_exit(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, in a thread of its own, when the parent is gone."""

        def wait() -> None:
            with suppress(ConnectionError):
                self._connection.recv(1)
            callback()

        threading.Thread(target=wait, name="lifeline", daemon=True).start()
