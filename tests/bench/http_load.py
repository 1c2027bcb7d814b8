"""HTTP requests over raw sockets, each connection sending the next as soon as one is answered."""

import re
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from tests.bench.events import NumberedRequest, TenantRequest
from tests.bench.meter import Meter

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_RECEIVE_BYTES = 1 << 16
_LAST_ANSWERS_SECONDS = 30.0


class HttpConnection:
    """A connection that is kept alive, with a request of its own that is sent again and again."""

    def __init__(self, port: int, request: NumberedRequest | TenantRequest) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.local_port: int = self.socket.getsockname()[1]
        self.started_at = 0.0
        self._request = request
        self._unsent = memoryview(b"")
        self._received = b""

    def close(self) -> None:
        """End the connection."""
        self.socket.close()

    def start(self, number: int) -> None:
        """Send as much of the next request as the socket takes."""
        self._request.number(number)
        self._received = b""
        self._unsent = memoryview(self._request.buffer)
        self.started_at = time.perf_counter()
        self.send()

    def send(self) -> None:
        """Send more of the request, if there is more."""
        while self._unsent:
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except BlockingIOError:
                return

    def receive(self) -> bytes | None:
        """Return the whole answer once it is there.

        Raises ConnectionError if the connection ends.
        """
        try:
            received = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return None
        if not received:
            raise ConnectionError(f"the server closed the connection after {self._received!r}")
        self._received += received
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = _CONTENT_LENGTH.search(head)
        if not end or length is None or len(body) < int(length[1]):
            return None
        return self._received


class HttpLoad:
    """Connections that are all busy while `run` runs."""

    def __init__(self, connections: Sequence[HttpConnection], count: int, first: int) -> None:
        self._accepted = b'{"accepted":%d,' % count
        self._by_descriptor = {c.socket.fileno(): c for c in connections}
        self._numbers: Iterator[int] = iter(range(first, 1 << 32))
        self._poll = select.epoll()
        # Edge-triggered: a socket that stays writable is not reported again and again.
        interest = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
        for descriptor in self._by_descriptor:
            self._poll.register(descriptor, interest)

    def start(self, _meter: Meter) -> None:
        """Send the first requests."""
        for connection in self._by_descriptor.values():
            connection.start(next(self._numbers))

    def run(self, seconds: float, meter: Meter) -> None:
        """Keep all connections busy for this long, and until one is answered."""
        deadline = time.perf_counter() + seconds
        last = deadline + _LAST_ANSWERS_SECONDS

        def is_over() -> bool:
            now = time.perf_counter()
            return now >= (deadline if meter.latencies else last)

        self._follow(meter, is_over, restart=True)

    def finish(self, meter: Meter) -> None:
        """Wait for the outstanding answers, and close the connections."""
        deadline = time.perf_counter() + _LAST_ANSWERS_SECONDS
        count = len(meter.latencies) + len(self._by_descriptor)
        self._follow(
            meter,
            lambda: len(meter.latencies) == count or time.perf_counter() > deadline,
            restart=False,
        )
        for connection in self._by_descriptor.values():
            connection.close()
        self._poll.close()

    def _follow(self, meter: Meter, is_over: Callable[[], bool], *, restart: bool) -> None:
        while not is_over():
            for descriptor, mask in self._poll.poll(0.1):
                connection = self._by_descriptor[descriptor]
                connection.send()
                if mask & select.EPOLLIN and (answer := connection.receive()):
                    meter.latencies.append(time.perf_counter() - connection.started_at)
                    if b" 202 " not in answer[:16] or self._accepted not in answer:
                        meter.failures[answer.decode(errors="replace")] += 1
                    if restart:
                        connection.start(next(self._numbers))
