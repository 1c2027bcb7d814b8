"""The way of a process's counts to the parent: messages over one socket that all processes share.

Nothing waits for a report: a process adds to its counts in memory, and its watchdog sends what
changed. If the parent cannot take it at the moment, it is sent later, together with what has
been counted since. No file is involved, and nothing has to be removed for a process that is gone.
"""

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from server.telemetry.counting import Counts, Report, Totals

# The variable by which a process learns the descriptor of the socket.
_SOCKET = "PRODUCTGRAPH_METRICS"
_RETRY_SECONDS = 0.05
_LAST_SECONDS = 1.0
_MAX_MESSAGE_BYTES = 1 << 18

_log = logging.getLogger("productgraph.metrics")


def find_socket() -> socket.socket | None:
    """Return the socket for reports that the parent handed down, or None if it handed down none."""
    if (number := os.environ.pop(_SOCKET, None)) is None:
        return None
    connection = socket.socket(fileno=int(number))
    connection.set_inheritable(False)
    return connection


class Reporter:
    """Reports what a process counts to its parent, as often as a watchdog calls `report`.

    Before each report it calls `refresh`, which counts what is only counted then.
    """

    def __init__(
        self, connection: socket.socket, counts: Counts, refresh: Callable[[], object]
    ) -> None:
        self._socket = connection
        self._counts = counts
        self._refresh = refresh
        self._unsent: list[bytes] = []

    def report(self) -> None:
        """Send what has changed; never waits. In one thread at a time."""
        if self._send():
            self._unsent = self._collect()
            self._send()

    def stop(self) -> None:
        """Report one last time, for a second at most: the parent may hang or be gone."""
        deadline = time.monotonic() + _LAST_SECONDS
        self._unsent += self._collect()
        while not self._send() and time.monotonic() < deadline:
            time.sleep(_RETRY_SECONDS)

    def _collect(self) -> list[bytes]:
        self._refresh()
        return self._counts.take().encode()

    def _send(self) -> bool:
        """Send what is unsent, without waiting; return whether all of it is sent."""
        while self._unsent:
            try:
                self._socket.send(self._unsent[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:  # the parent is gone, and nobody reads the page
                self._unsent.clear()
                break
            del self._unsent[0]
        return True


class ReportReceiver:
    """Adds up the reports of the processes that inherit `descriptor` and have `environment`."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    @property
    def descriptor(self) -> int:
        """The end of the processes."""
        return self._theirs.fileno()

    @property
    def environment(self) -> Mapping[str, str]:
        """The variable by which `find_socket` finds it."""
        return {_SOCKET: str(self.descriptor)}

    def start(self) -> None:
        """Start receiving."""
        self._thread.start()

    def stop(self) -> None:
        """Stop receiving; what the processes send from now on is lost."""
        self._stopped = True
        self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._ours.close()
        self._theirs.close()

    def note_exit(self, process: int) -> None:
        """Drop the gauges of a process that is gone, after the last reports that it sent."""
        with self._lock:
            self._receive()
            self._totals.forget(process)

    def _run(self) -> None:
        arrivals = select.poll()
        arrivals.register(self._ours, select.POLLIN)
        while not self._stopped:
            arrivals.poll()
            with self._lock:  # or a report could be added after its process is forgotten
                self._receive()

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            while message := self._ours.recv(_MAX_MESSAGE_BYTES):
                try:
                    self._totals.add(Report.decode(message))
                except Exception:  # noqa: BLE001 - one report less, but those that follow count
                    _log.exception("a report of metrics could not be read")
