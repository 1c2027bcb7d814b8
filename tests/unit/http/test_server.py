"""The HTTP server: answers held back without a thread, and hostile framing of requests."""

import http.client
import importlib.metadata
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import orjson
import pytest

from server.deferral import ENVIRON_KEY
from server.errors import Unavailable
from server.http.server import HTTPServer, _Channel
from tests.support.events import make_event
from tests.support.projects import Project
from tests.support.services import Service, wait_until

TIMEOUT_SECONDS = 10.0


class HoldingApp:
    """Answers with the path; on /held the answer waits for one of the futures it collects."""

    def __init__(self) -> None:
        self.held: list[Future[None]] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """Return the application, as WSGI has it."""
        body, deferral = environ["PATH_INFO"], environ[ENVIRON_KEY]
        if deferral.failure is not None:
            body = f"failed: {deferral.failure}"
        elif body == "/held":
            deferral.hold(self._add())
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body.encode()]

    def _add(self) -> "Future[None]":
        future: Future[None] = Future()
        self.held.append(future)
        return future

    def wait_for(self, count: int) -> None:
        """Return once this many answers are held."""
        wait_until(lambda: len(self.held) >= count)

    def release(self) -> None:
        """Lets the held answers go."""
        for future in self.held:
            future.set_result(None)


@pytest.fixture
def app() -> HoldingApp:
    """Return the application of `port`."""
    return HoldingApp()


@pytest.fixture
def port(app: HoldingApp, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Where an HTTPServer with two threads serves the application."""
    # So that an answer which only the loop's timer would send is missed here.
    monkeypatch.setattr("server.http.server._LOOP_SECONDS", 6 * TIMEOUT_SECONDS)
    with serving(app) as port:
        yield port


@contextmanager
def serving(app: Callable[..., Any], **options: Any) -> Iterator[int]:
    """Serve an application on the port that it yields."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = HTTPServer(app, listener, max_body_bytes=1 << 20, **options)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.stop()
        thread.join()
        server.drain(TIMEOUT_SECONDS)


def connect(port: int) -> socket.socket:
    """Return a connection that gives up on an answer after a while."""
    return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS)


def send_get(port: int, path: str) -> http.client.HTTPConnection:
    """Return a connection on which a request has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    connection.request("GET", path)
    return connection


def get(port: int, path: str) -> str:
    """Return the body of the answer."""
    with closing(send_get(port, path)) as connection:
        return connection.getresponse().read().decode()


def read_to_end(connection: socket.socket) -> str:
    """All that comes until the server closes the connection, or a reset if it comes first."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received.decode()


def test_the_installed_waitress_is_the_expected_one() -> None:
    """The installed waitress is the one whose insides the server was written for."""
    assert importlib.metadata.version("waitress") == "3.0.2"


def test_a_held_answer_waits_for_its_future(app: HoldingApp, port: int) -> None:
    """A held answer is sent when its future is done, and not before."""
    with closing(send_get(port, "/held")) as connection:
        app.wait_for(1)
        assert get(port, "/other") == "/other"
        connection.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.sock.recv(1)
        connection.sock.settimeout(TIMEOUT_SECONDS)
        app.release()
        assert connection.getresponse().read() == b"/held"


def test_two_hundred_held_answers_take_no_thread(app: HoldingApp, port: int) -> None:
    """Two hundred held answers take none of two threads, and are all sent."""
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(send_get(port, "/held"))) for _ in range(200)]
        app.wait_for(200)
        assert get(port, "/other") == "/other"
        app.release()
        assert [c.getresponse().read() for c in connections] == [b"/held"] * 200


def test_a_failed_future_calls_the_application_again(app: HoldingApp, port: int) -> None:
    """When the future fails, the application is called again and answers the failure."""
    with closing(send_get(port, "/held")) as connection:
        app.wait_for(1)
        app.held[0].set_exception(Unavailable("too late"))
        assert connection.getresponse().read() == b"failed: too late"


def test_an_answer_held_too_late_is_sent_at_once(
    port: int, app: HoldingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer held for a future that is done already is sent at once."""
    done: Future[None] = Future()
    done.set_result(None)
    monkeypatch.setattr(app, "_add", lambda: done)
    assert get(port, "/held") == "/held"


def test_a_connection_goes_on_after_a_held_answer(app: HoldingApp, port: int) -> None:
    """After a held answer the connection takes the next request."""
    with closing(send_get(port, "/held")) as connection:
        app.wait_for(1)
        app.release()
        assert connection.getresponse().read() == b"/held"
        connection.auto_open = False
        connection.request("GET", "/next")
        assert connection.getresponse().read() == b"/next"


def test_idle_connections_cost_a_request_nothing(
    app: HoldingApp, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While requests are answered, connections without one are not looked at."""
    asked: list[object] = []
    readable = _Channel.readable

    def ask(channel: _Channel) -> bool:
        asked.append(channel)
        return readable(channel)

    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(port))
        assert get(port, "/first") == "/first"
        monkeypatch.setattr(_Channel, "readable", ask)
        started = time.monotonic()
        with closing(send_get(port, "/")) as connection:
            for _ in range(200):
                connection.getresponse().read()
                connection.request("GET", "/")
            sweeps = 1 + int(time.monotonic() - started)
    assert len(asked) < 200 * 20 + sweeps * 2 * 300
    assert not app.held


def test_pipelined_held_answers_keep_their_order(app: HoldingApp, port: int) -> None:
    """Pipelined requests are answered in their order when the first and the third are held."""
    with connect(port) as connection:
        paths = ["/held", "/second", "/held", "/last"]
        requests = [f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n" for path in paths[:-1]]
        requests.append(f"GET {paths[-1]} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        connection.sendall("".join(requests).encode())
        app.wait_for(1)
        app.held[0].set_result(None)
        app.wait_for(2)
        app.held[1].set_result(None)
        assert re.findall(r"\r\n\r\n(/[a-z]+)", read_to_end(connection)) == paths


def test_a_client_gone_before_its_answer_disturbs_nobody(app: HoldingApp, port: int) -> None:
    """A client that is gone when its held answer is ready disturbs nobody."""
    with closing(send_get(port, "/held")) as connection:
        for _ in range(10):
            with closing(send_get(port, "/held")):
                pass
        app.wait_for(11)
        app.release()
        assert connection.getresponse().read() == b"/held"
        assert get(port, "/other") == "/other"


def test_a_held_answer_to_head_has_no_body(app: HoldingApp, port: int) -> None:
    """A held answer to HEAD has no body, and the connection goes on."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, TIMEOUT_SECONDS)) as connection:
        connection.request("HEAD", "/held")
        app.wait_for(1)
        app.release()
        answer = connection.getresponse()
        assert (answer.headers["Content-Length"], answer.read()) == ("5", b"")
        connection.request("GET", "/next")
        assert connection.getresponse().read() == b"/next"


@pytest.mark.parametrize(
    "request_head", ["GET /held HTTP/1.0", "GET /held HTTP/1.1\r\nHost: x\r\nConnection: close"]
)
def test_a_closing_request_ends_its_connection(
    request_head: str, app: HoldingApp, port: int
) -> None:
    """HTTP/1.0 and Connection: close end the connection after a held answer."""
    with connect(port) as connection:
        connection.sendall(f"{request_head}\r\n\r\n".encode())
        app.wait_for(1)
        app.release()
        answer = read_to_end(connection)
        assert "\r\nConnection: close\r\n" in answer
        assert answer.endswith("\r\n\r\n/held")


class Keepsake:
    """Counts how often it was found again, and closed."""

    found = closed = 0

    def close(self) -> None:
        """Note that the request is over."""
        self.closed += 1


class KeepingApp(HoldingApp):
    """Keeps something of each request; on /repeat it is called again after the wait."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Keepsake] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """Return the application, as WSGI has it."""
        deferral = environ[ENVIRON_KEY]
        if deferral.pending:
            deferral.pending.found += 1
        else:
            self.kept.append(Keepsake())
            deferral.pending = self.kept[-1]
            if environ["PATH_INFO"] == "/repeat":
                deferral.hold(self._add(), repeat=True)
        return super().__call__(environ, start_response)

    def count(self) -> list[tuple[int, int]]:
        """How often what was kept has been found and closed, in the order of the requests."""
        return [(kept.found, kept.closed) for kept in self.kept]


@pytest.mark.parametrize(("path", "found"), [("/at-once", 0), ("/held", 0), ("/repeat", 1)])
def test_what_a_request_keeps_is_closed_after_its_answer(path: str, found: int) -> None:
    """What is kept of a request is found when it is repeated, and closed once it is answered."""
    app = KeepingApp()
    with serving(app) as port, closing(send_get(port, path)) as connection:
        wait_until(lambda: app.kept)
        assert app.count() == [(0, 0)] or not app.held
        app.release()
        assert connection.getresponse().read() == path.encode()
        connection.request("GET", path)
        wait_until(lambda: len(app.kept) == 2)
        assert app.count()[0] == (found, 1)
        for future in app.held[1:]:
            future.set_result(None)
        assert connection.getresponse().read() == path.encode()
    assert app.count() == [(found, 1)] * 2


def test_what_a_request_keeps_is_found_on_failure() -> None:
    """What is kept of a request is found by the call that answers a failure, and closed once."""
    app = KeepingApp()
    with serving(app) as port, closing(send_get(port, "/held")) as connection:
        app.wait_for(1)
        app.held[0].set_exception(Unavailable("too late"))
        assert connection.getresponse().read() == b"failed: too late"
    assert app.count() == [(1, 1)]


@pytest.mark.parametrize("failure", [None, Unavailable("too late")])
@pytest.mark.parametrize("path", ["/held", "/repeat"])
def test_what_a_gone_client_kept_is_closed(path: str, failure: Exception | None) -> None:
    """What is kept of a request is closed once though its client is gone."""
    app = KeepingApp()
    with serving(app) as port:
        with closing(send_get(port, path)) as connection:
            app.wait_for(1)
            # Closing it resets the connection, so that nothing can be written.
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert get(port, "/other") == "/other"
        assert app.kept[0].closed == 0
        if failure:
            app.held[0].set_exception(failure)
        else:
            app.held[0].set_result(None)
        wait_until(lambda: app.kept[0].closed)
        assert get(port, "/other") == "/other"
    assert app.kept[0].closed == 1


class ThreadApp:
    """Tells in which thread it was called; a large body may occupy that until `go` is set.

    The first call for /repeat is repeated, the first for /hand-over is handed to the thread.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """Answer with the length of the body, or with the failure."""
        path, deferral = environ["PATH_INFO"], environ[ENVIRON_KEY]
        is_first = path not in [called for called, _ in self.calls]
        where = "loop" if deferral.in_loop else threading.current_thread().name
        self.calls.append((path, where))
        answer = str(len(environ["wsgi.input"].read()))
        if deferral.failure is not None:
            answer = f"failed: {deferral.failure}"
        elif path == "/repeat" and is_first:
            done: Future[None] = Future()
            done.set_result(None)
            deferral.hold(done, repeat=True)
        elif path == "/hand-over" and deferral.in_loop:
            deferral.hand_over()
        elif path == "/occupy":
            self.entered.set()
            assert self.go.wait(TIMEOUT_SECONDS)
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer.encode()]


def send_post(port: int, path: str, size: int) -> http.client.HTTPConnection:
    """Return a connection on which a body of this size has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    connection.request("POST", path, b"x" * size)
    return connection


LARGE = 100_000


@pytest.mark.parametrize(
    ("path", "size", "places"),
    [
        ("/small", 10, ["loop"]),
        ("/large", LARGE, ["waitress-0"]),
        ("/repeat", 10, ["loop"] * 2),
        ("/repeat", LARGE, ["waitress-0"] * 2),
        ("/hand-over", 10, ["loop", "waitress-0"]),
    ],
)
def test_large_requests_run_in_the_thread(path: str, size: int, places: list[str]) -> None:
    """The loop runs what is small; what is large, or handed over, runs in the thread each time."""
    app = ThreadApp()
    with serving(app, gate=lambda _: True) as port, closing(send_post(port, path, size)) as sent:
        assert sent.getresponse().read() == str(size).encode()
    assert app.calls == [(path, place) for place in places]


def test_requests_waiting_for_a_thread_expire_in_time() -> None:
    """A large request that waits too long for another one is refused before that is through."""
    app = ThreadApp()
    with (
        serving(app, gate=lambda _: True, answer_seconds=0.3) as port,
        closing(send_post(port, "/occupy", LARGE)) as occupying,
    ):
        assert app.entered.wait(TIMEOUT_SECONDS)
        with closing(send_post(port, "/large", LARGE)) as waiting:
            assert waiting.getresponse().read() == b"failed: not answered in time"
        app.go.set()
        assert occupying.getresponse().read() == str(LARGE).encode()
    assert app.calls == [("/occupy", "waitress-0"), ("/large", "loop")]


def test_a_body_waits_for_the_gate() -> None:
    """Nothing more is read of a body until the gate has decided, and then all of it."""
    known: Future[bool] = Future()
    asked = threading.Event()

    def gate(_request: object) -> Any:
        asked.set()
        return True if known.done() else known

    with serving(ThreadApp(), gate=gate) as port, connect(port) as connection:
        head = f"POST /large HTTP/1.1\r\nHost: x\r\nContent-Length: {LARGE}\r\n\r\n"
        connection.sendall(head.encode() + b"x" * (LARGE - 1))
        assert asked.wait(TIMEOUT_SECONDS)
        connection.sendall(b"x")
        known.set_result(True)
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection).endswith(str(LARGE))


def test_a_refused_body_is_dropped() -> None:
    """A body that the gate refuses is read to its end, and the application told the error."""
    with (
        serving(ThreadApp(), gate=lambda _: Unavailable("no")) as port,
        closing(send_post(port, "/large", LARGE)) as sent,
    ):
        assert sent.getresponse().read() == b"failed: no"
        sent.request("POST", "/again", b"x" * LARGE)
        assert sent.getresponse().read() == b"failed: no"


def test_the_connection_idle_longest_makes_room(
    app: HoldingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When connections run out, idle ones go first, and none whose request is being answered."""
    monkeypatch.setattr("server.http.server._CONNECTIONS", 22)
    evicted: list[None] = []
    with serving(app, on_eviction=lambda: evicted.append(None)) as port, ExitStack() as stack:
        held = stack.enter_context(closing(send_get(port, "/held")))
        app.wait_for(1)
        idle = [stack.enter_context(connect(port)) for _ in range(40)]
        for connection in idle[20:]:
            connection.sendall(b"GET /unfinished HTTP/1.1\r\nX-")
        for _ in range(5):
            assert get(port, "/other") == "/other"
        assert idle[0].recv(1) == b""
        assert len(evicted) >= 20
        app.release()
        assert held.getresponse().read() == b"/held"


def test_a_flood_of_connections_delays_nobody_behind_it(app: HoldingApp) -> None:
    """Connections that queue up are accepted many in a turn: who is behind them waits for few."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = HTTPServer(app, listener)
    with ExitStack() as stack:
        stack.callback(server.drain, 0.0)
        for _ in range(300):
            stack.enter_context(connect(listener.getsockname()[1]))
        last = stack.enter_context(connect(listener.getsockname()[1]))
        last.sendall(b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        for _ in range(10):
            server._run_loop(1.0)
        assert read_to_end(last).endswith("/last")


# What a proxy that reads the framing differently would take for a request of its own, and what
# closes the connection where it is read as one.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

BAD_HEADS = {
    "two lengths": b"Content-Length: 0\r\nContent-Length: %d" % len(SMUGGLED),
    "two equal lengths": b"Content-Length: 0\r\nContent-Length: 0",
    "space before the colon": b"Transfer-Encoding : chunked",
    "control character": b"Transfer-Encoding: \x0bchunked",
    "negative length": b"Content-Length: -1",
    "signed length": b"Content-Length: +1",
    "grouped length": b"Content-Length: 1_0",
    "empty length": b"Content-Length:",
    "length of 5,000 digits": b"Content-Length: " + b"9" * 5000,
    "bare line feed": b"X: y\nContent-Length: 0",
    "bare carriage return": b"X: y\rContent-Length: 0",
    "NUL": b"X: \x00",
}
BAD_CHUNKS = {
    "junk for an extension": b"0;\n\r\n\r\n",
    "NUL in an extension": b"0;a=\x00b\r\n\r\n",
    "size with a prefix": b"0x0\r\n\r\n",
    "negative size": b"-1\r\n\r\n",
    "no size": b"\r\n0\r\n\r\n",
    "no size after a chunk": b"1\r\nZ\r\n\r\n0\r\n\r\n",
    "size ended by a line feed": b"1\nZ\r\n0\r\n\r\n",
    "chunk longer than its size": b"1\r\nZZ\r\n0\r\n\r\n",
}


def exchange(port: int, request: bytes) -> list[int]:
    """Return the statuses of all answers until the server closes the connection."""
    with connect(port) as connection:
        with suppress(ConnectionError):  # it may have closed it before it has read everything
            connection.sendall(request)
        answers = read_to_end(connection)
    return [int(status) for status in re.findall(r"HTTP/1\.[01] (\d+) ", answers)]


def post(head: bytes, body: bytes = b"") -> bytes:
    """Return a request, malformed as wanted, with others behind it."""
    return b"POST /v1/events HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n" + body + SMUGGLED + LAST


@pytest.mark.parametrize("head", BAD_HEADS.values(), ids=BAD_HEADS.keys())
def test_an_ambiguous_head_is_refused_with_its_connection(head: bytes, service: Service) -> None:
    """A head that two servers could read differently is refused, and nothing after it is read."""
    assert exchange(service.http_port, post(head)) == [400]


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
def test_malformed_chunks_are_refused_with_their_connection(
    chunks: bytes, service: Service
) -> None:
    """Malformed chunks are refused, and nothing after them is read."""
    request = post(b"Transfer-Encoding: chunked", chunks)
    assert exchange(service.http_port, request) == [400]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (post(b"Transfer-Encoding: xchunked"), 501),
        (post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"), 501),
        (post(b"Content-Length: 99999999999999999999"), 413),
        (post(b"\r\n".join(b"X-%d: y" % number for number in range(10_000))), 431),
        (post(b"X: " + b"y" * 100_000), 431),
        (b"POST /v1/events HTTP/1.1\nHost: x\nContent-Length: 0\n\n" + SMUGGLED + LAST, 400),
        (b"GET http://[::1/health HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED + LAST, 400),
        (bytes(range(256)) + b"\r\n\r\n" + SMUGGLED + LAST, 400),
    ],
    ids=["coding", "codings", "length", "headers", "header", "line feeds", "address", "garbage"],
)
def test_a_refusal_by_waitress_has_the_documented_status(
    request_bytes: bytes, status: int, service: Service
) -> None:
    """What waitress refuses by itself ends the connection with the documented status."""
    assert exchange(service.http_port, request_bytes) == [status]


def test_a_length_beside_chunks_ends_the_connection(service: Service) -> None:
    """A request with both a length and chunks is the last one that its connection takes."""
    head = b"Content-Length: %d\r\nTransfer-Encoding: chunked" % (5 + len(SMUGGLED))
    assert len(exchange(service.http_port, post(head, b"0\r\n\r\n"))) == 1


@pytest.mark.parametrize("start", [b"", b"0\r\n"], ids=["size", "trailer"])
def test_an_endless_chunk_line_is_refused_early(start: bytes, service: Service) -> None:
    """The line of a chunk's size, and a trailer, are refused long before the largest body."""
    head = b"POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(service.http_port, head + start + b"1" * (1 << 20)) == [400]


def test_a_chunked_body_is_one_request(service: Service, project: Project) -> None:
    """A chunked body with extensions and a trailer is one request, and the next one follows."""
    body = orjson.dumps({"events": [make_event(project.id)], "note": SMUGGLED.decode()})
    chunks = b'%x;a="b"\r\n%b\r\n0\r\nX: y\r\n\r\n' % (len(body), body)
    head = f"Content-Type: application/json\r\nX-PG-API-Key: {project.key}\r\n"
    request = post(head.encode() + b"Transfer-Encoding: chunked", chunks)
    assert exchange(service.http_port, request) == [202, 404, 200]
