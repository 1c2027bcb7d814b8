"""Connections that were used once and do nothing since."""

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_ANSWER_SECONDS = 30.0
_SPARE_FILES = 200


class IdleConnections:
    """Connections over HTTP that the service has answered once."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._sockets = sockets

    def count_open(self) -> int:
        """Return how many of them the service has not closed."""
        return sum(map(_is_open, self._sockets))


def _is_open(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@contextmanager
def idle_connections(port: int, count: int) -> Iterator[IdleConnections]:
    """Open this many connections, and close them at the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(max(soft, count + _SPARE_FILES), hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    with ExitStack() as stack:
        sockets = []
        for _ in range(count):
            address = ("127.0.0.1", port)
            connection = socket.create_connection(address, timeout=_ANSWER_SECONDS)
            sockets.append(stack.enter_context(connection))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            connection.recv(1 << 16)
            connection.setblocking(False)
        yield IdleConnections(sockets)
