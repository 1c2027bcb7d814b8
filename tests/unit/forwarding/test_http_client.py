"""Requests to providers: what comes back is distrusted."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from server.forwarding import http_client as transport
from server.forwarding.http_client import Transport
from server.forwarding.providers.provider import MAX_ANSWER_BYTES, Answer, NoAnswer, Request

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


@contextmanager
def serving(answer: Callable[[socket.socket], object]) -> Iterator[tuple[str, list[bytes]]]:
    """Provide a server that answers so; yield its URL and what requests begin with."""
    requests: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):  # closed, from either side
            while True:
                connection, _ = listener.accept()
                with connection, suppress(ConnectionError):
                    requests.append(connection.recv(65536))
                    answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/in", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def post(url: str) -> Answer | NoAnswer:
    """Return what becomes of a request."""

    async def send() -> Answer | NoAnswer:
        sender = Transport(1)
        try:
            return await sender.send(Request(url, {}, b"{}"))
        finally:
            await sender.close()

    return asyncio.run(send())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_outgoing_requests_follow_no_redirect(status: int) -> None:
    """No redirect is followed: events and credential stay where the settings send them."""
    with serving(lambda connection: connection.sendall(HEAD % 0)) as (other, strays):
        head = f"HTTP/1.1 {status} Over There\r\nLocation: {other}\r\nContent-Length: 0\r\n\r\n"
        with serving(lambda connection: connection.sendall(head.encode())) as (url, requests):
            answer = post(url)
    assert isinstance(answer, Answer)
    assert answer.status == status
    assert len(requests) == 1
    assert strays == []


def test_an_endless_answer_is_read_to_a_limit() -> None:
    """An answer is read up to a limit, however much comes."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(HEAD % (1 << 40))
        while True:  # until the other side has had enough
            connection.sendall(b" " * 65536)

    with serving(answer) as (url, _):
        received = post(url)
    assert isinstance(received, Answer)
    assert len(received.body) == MAX_ANSWER_BYTES


def test_a_compressed_answer_is_not_unpacked() -> None:
    """No compressed answer is asked for, and one that comes all the same is not unpacked."""
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n"
    with serving(lambda connection: connection.sendall(head + b"bomb")) as (url, requests):
        answer = post(url)
    assert isinstance(answer, Answer)
    assert answer.body == b"bomb"
    assert b"accept-encoding: identity\r\n" in requests[0].lower()


def test_an_answer_that_drips_for_ever_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that never pauses and never ends is given up."""
    monkeypatch.setattr(transport, "TOTAL_SECONDS", 0.5)

    def answer(connection: socket.socket) -> None:
        connection.sendall(HEAD % 1000)
        while True:
            connection.sendall(b" ")
            time.sleep(0.05)

    with serving(answer) as (url, _):
        assert post(url) == NoAnswer("TimeoutError")
