"""Byte streams for the HTTP port that are no proper requests, and what may come back."""

import re
import socket
import time
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from tests.hostile.grammar import damage
from tests.hostile.record import LIMIT_SECONDS

# A request that is answered only if the framing before it was read as another server would not,
# and one that ends the connection.
_SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
_LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
_POST = b"POST /v1/events HTTP/1.1\r\nHost: x\r\n"
_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

# Heads that two servers could read differently, or that are malformed.
_BAD_HEADS = (
    *(b"Content-Length: 0\r\nContent-Length: %d" % len(_SMUGGLED), b"Content-Length: 0, 0"),
    *(b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding : chunked"),
    *(b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding: chunked, chunked"),
    *(b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"),
    *(b"Content-Length: -1", b"Content-Length: +1", b"Content-Length: 1_0", b"Content-Length:"),
    *(b"Content-Length: 0x1", b"Content-Length: " + b"9" * 5000, b"Content-Length: 1e1"),
    *(b"X: y\nContent-Length: 0", b"X: y\rContent-Length: 0", b"X: \0", b"X\r\nY: z", b": y"),
    *(b"Content-Length: 99999999999999999999", b"X: " + b"y" * 70_000, b"X y: z"),
)
_BAD_CHUNKS = (
    *(b"0;\n\r\n\r\n", b"0;a=\0b\r\n\r\n", b"0x0\r\n\r\n", b"-1\r\n\r\n", b"1\nZ\r\n0\r\n\r\n"),
    *(b"1\r\nZZ\r\n0\r\n\r\n", b"\r\n0\r\n\r\n", b"G\r\n\r\n", b"+1\r\nZ\r\n0\r\n\r\n"),
    *(b"1" * 20_000 + b"\r\n", b"1_0\r\nZ", b" 1\r\nZ\r\n0\r\n\r\n"),
)
_FOREIGN = (
    *(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 60,
    ),
    *(
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"EHLO x\r\n\r\n",
        b"\0" * 2000,
        b"GET /health\r\n\r\n",
        b"\n" * 500,
    ),
    *(b"GET http://[::1/ HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\xff\xfb\x1f\r\n\r\n"),
    *(b"GET /%00%ff%zz HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"),
    *(b"*1\r\n$4\r\nPING\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"GET\r\n\r\n"),
)
_METHODS = (
    b"get",
    b"TRACE",
    b"CONNECT",
    b"DELETE",
    b"PATCH",
    b"PROPFIND",
    b"X" * 200,
    b"G\xc3\xa9T",
)
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_REFUSED = frozenset((400, 413, 431, 501))
# A server that wants more of a request says nothing: so long is waited before the stream is ended.
_SILENCE_SECONDS = 0.15


class Stream(NamedTuple):
    """Bytes for one connection.

    `refused`: nothing but one refusal may come back. `answers`: this many good ones do.
    """

    content: bytes
    refused: bool = False
    answers: int | None = None


class StreamGrammar:
    """Makes one stream after the other."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._kinds: list[Callable[[], Stream]] = [
            self._smuggle,
            self._smuggle,
            self._spoil_chunks,
            self._spoil_chunks,
            self._damage,
            self._damage,
            self._cut,
            self._speak_another_protocol,
            self._make_garbage,
            self._pipeline,
            self._call_by_other_methods,
            self._expect,
        ]

    def __call__(self) -> Stream:
        """Return the next stream."""
        return self._random.choice(self._kinds)()

    def _smuggle(self) -> Stream:
        head = self._random.choice(_BAD_HEADS)
        if self._random.randrange(2):
            head = b"Accept: */*\r\n" + head
        return Stream(_POST + head + b"\r\n\r\n" + _SMUGGLED + _LAST, refused=True)

    def _spoil_chunks(self) -> Stream:
        head = _POST + b"Transfer-Encoding: chunked\r\n\r\n"
        good = b"".join(
            b"%x\r\n%b\r\n" % (n, b"x" * n) for n in range(1, self._random.randrange(5))
        )
        chunks = self._random.choice(_BAD_CHUNKS)
        return Stream(head + good + chunks + _SMUGGLED + _LAST, refused=True)

    def _damage(self) -> Stream:
        body = b'{"events": []}'
        head = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        return Stream(damage(_POST + head + body, self._random) + _LAST)

    def _cut(self) -> Stream:
        content = _POST + b"Content-Length: 100\r\n\r\n" + b"x" * 99
        return Stream(content[: self._random.randrange(len(content))], answers=0)

    def _speak_another_protocol(self) -> Stream:
        return Stream(self._random.choice(_FOREIGN))

    def _make_garbage(self) -> Stream:
        return Stream(self._random.randbytes(self._random.randrange(1, 3000)) + b"\r\n\r\n")

    def _pipeline(self) -> Stream:
        count = self._random.randrange(1, 40)
        return Stream(_HEALTH * count + _LAST, answers=count + 1)

    def _call_by_other_methods(self) -> Stream:
        return Stream(self._random.choice(_METHODS) + b" /v1/events HTTP/1.1\r\n\r\n" + _LAST)

    def _expect(self) -> Stream:
        body = self._random.choice((b"", b"{}"))
        head = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
        return Stream(_POST + head + body + _LAST)


def send_stream(port: int, stream: Stream) -> tuple[list[int], float]:
    """Return the statuses that came back until the end, and how long that took.

    Raises TimeoutError if the server does not end the connection after the client has.
    """
    started_at, received = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port), LIMIT_SECONDS) as connection:
        try:
            connection.sendall(stream.content)
            connection.settimeout(_SILENCE_SECONDS)
            while True:
                try:
                    part = connection.recv(1 << 16)
                except TimeoutError:
                    break
                received += part
                if not part:
                    return _read_statuses(received), time.monotonic() - started_at
            connection.settimeout(LIMIT_SECONDS)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                received += part
        except ConnectionError:
            pass  # it may be closed before all is read, or with something unread
    return _read_statuses(received), time.monotonic() - started_at - _SILENCE_SECONDS


def _read_statuses(received: bytes) -> list[int]:
    return [int(status) for status in _STATUS.findall(received) if status != b"100"]


def find_problem(stream: Stream, statuses: list[int]) -> str | None:
    """Return what is wrong with the answers to a stream, or None."""
    faults = [status for status in statuses if status >= 500]
    if faults and not (faults == [501] and b"transfer-encoding" in stream.content.lower()):
        return f"answered {faults}"
    if stream.refused and statuses and (len(statuses) > 1 or statuses[0] not in _REFUSED):
        return f"answered {statuses} instead of one refusal"
    if stream.answers is not None and statuses != [200] * stream.answers:
        return f"answered {statuses} instead of {stream.answers} answers"
    return None
