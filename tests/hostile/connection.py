"""HTTP over a raw socket: whatever bytes are sent, and an answer read strictly."""

import re
import socket
import time
from typing import Any, NamedTuple

import orjson

from tests.hostile.record import LIMIT_SECONDS

_HEAD = re.compile(rb"HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n(.*?\r\n)??\r\n", re.DOTALL)
_LENGTH = re.compile(rb"^content-length: (\d+)\r$", re.IGNORECASE | re.MULTILINE)
_CLOSES = re.compile(rb"^connection: close\r$", re.IGNORECASE | re.MULTILINE)
_RETRY = re.compile(rb"^retry-after: (\d+)\r$", re.IGNORECASE | re.MULTILINE)
# Longer than any answer may take, so that how long one took is known.
_PATIENCE_SECONDS = 4 * LIMIT_SECONDS


class NoAnswer(Exception):
    """The connection ended, or stayed silent, before an answer was complete."""


class Answer(NamedTuple):
    """An answer, and how long after the whole request was sent it came."""

    status: int
    head: bytes
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        """The decoded body. Raises ValueError if it is not JSON."""
        return orjson.loads(self.body)

    @property
    def has_retry_after(self) -> bool:
        """Whether it says after how many seconds to retry."""
        return _RETRY.search(self.head) is not None


class Connection:
    """Kept alive, and opened again if the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._received = b""

    def exchange(self, *parts: bytes) -> Answer:
        """Send a request and return its answer. Raises NoAnswer."""
        try:
            return self._exchange(parts)
        except OSError as error:
            self.close()
            raise NoAnswer(f"{type(error).__name__}: {error}") from error

    def _exchange(self, parts: tuple[bytes, ...]) -> Answer:
        connection = self._socket or self._connect()
        for part in parts:
            connection.sendall(part)
        sent_at = time.monotonic()
        while (match := _HEAD.match(self._received)) is None or match[1] == b"100":
            if match is not None:
                self._received = self._received[match.end() :]
            else:
                self._receive(connection)
        length = _LENGTH.search(match[0])
        end = match.end() + (int(length[1]) if length else 0)
        while len(self._received) < end:
            self._receive(connection)
        body, self._received = self._received[match.end() : end], self._received[end:]
        if _CLOSES.search(match[0]) or length is None:
            self.close()
        return Answer(int(match[1]), match[0], body, time.monotonic() - sent_at)

    def _connect(self) -> socket.socket:
        self._socket = socket.create_connection(("127.0.0.1", self._port), _PATIENCE_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def _receive(self, connection: socket.socket) -> None:
        received = connection.recv(1 << 16)
        if not received:
            raise ConnectionError(f"closed after {self._received[:200]!r}")
        self._received += received

    def close(self) -> None:
        """End the connection; the next request opens another."""
        self._received = b""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def encode_post(body: bytes, key: str | bytes, *headers: bytes) -> bytes:
    """Return a request with a body; if `headers` has no content type, it is that of JSON."""
    key = key if isinstance(key, bytes) else key.encode()
    lines = [b"POST /v1/events HTTP/1.1", b"Host: 127.0.0.1", b"X-PG-API-Key: " + key, *headers]
    if not any(header.startswith(b"Content-Type:") for header in headers):
        lines.append(b"Content-Type: application/json")
    lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
