"""The HTTP edge under clients that are careless, slow or hostile: framing, bodies, methods."""

import gzip
import json
import re
import socket
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection

import pytest

from tests.support.clients import Tenant, accepted
from tests.support.projects import Project
from tests.support.services import Service, ask, running_service, wait_until

SECONDS = 20.0
MEGABYTE = 1 << 20
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def talk(service: Service, *parts: bytes) -> str:
    """Return all that is answered until the connection is closed."""
    received = b""
    place = ("127.0.0.1", service.http_port)
    with socket.create_connection(place, SECONDS) as connection, suppress(ConnectionError):
        for part in parts:
            connection.sendall(part)
        while data := connection.recv(65536):
            received += data
    return received.decode()


def statuses(answer: str) -> list[int]:
    """Return the statuses of all answers."""
    return [int(status) for status in re.findall(r"HTTP/1\.[01] (\d+) ", answer)]


def post_head(key: str, *lines: str, length: int | None = None) -> bytes:
    """Return the head of a POST of events."""
    sized = [] if length is None else [f"Content-Length: {length}"]
    usual = ["POST /v1/events HTTP/1.1", "Host: x", "Content-Type: application/json"]
    return "\r\n".join([*usual, f"X-PG-API-Key: {key}", *sized, *lines, "", ""]).encode()


# Framing


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/events HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked",
        "POST /v1/events HTTP/1.7\r\nHost: x\r\nTransfer-Encoding: chunked",
        "POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked",
        "POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked,\r\n chunked",
        "POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        "Transfer-Encoding: chunked",
        "POST /v1/events HTTP/1.1\r\nContent-Length: 0",
        "POST /v1/events HTTP/1.1\r\nHost: x\r\nHost: x\r\nContent-Length: 0",
        "GET /health HTTP/1.1",
    ],
    ids=[
        "1.0",
        "1.7",
        "twice",
        "folded",
        "two headers",
        "no host",
        "two hosts",
        "no host of a get",
    ],
)
def test_ambiguous_requests_are_refused_and_closed(head: str, service: Service) -> None:
    """Framing that two servers could read differently is refused, and nothing after it is read."""
    answer = talk(service, head.encode() + b"\r\n\r\n0\r\n\r\n" + HEALTH)
    assert statuses(answer) == [400]


def test_a_tls_hello_is_closed_at_once(service: Service) -> None:
    """Who speaks TLS to the plain port is not left waiting for an answer."""
    hello = bytes.fromhex("16030100a5010000a10303") + bytes(20)
    assert talk(service, hello) == ""


# Expect: 100-continue


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("length", [None, 0])
def test_an_expectation_without_a_body_is_answered(
    length: int | None, is_known: bool, service: Service, project: Project
) -> None:
    """Expect without a body is answered like any request, and the next one is one of its own."""
    if is_known:  # to the worker, which then has not to wait for the database
        known = talk(service, post_head(project.key, "Connection: close", length=0))
        assert statuses(known) == [400]
    stranger = post_head("", "Connection: close", length=0)
    answer = talk(service, post_head(project.key, "Expect: 100-continue", length=length), stranger)
    assert statuses(answer) == [400, 401]


@pytest.mark.parametrize(("length", "status"), [(11 * MEGABYTE, 400), (21 * MEGABYTE, 413)])
def test_an_expected_body_that_is_too_large_is_refused(
    length: int, status: int, service: Service, project: Project
) -> None:
    """Whoever asks first whether to send too large a body gets the answer, and no 100."""
    answer = talk(service, post_head(project.key, "Expect: 100-continue", length=length))
    assert statuses(answer) == [status]


def test_an_expected_body_without_a_key_is_refused(service: Service) -> None:
    """Whoever asks first whether to send a body without a key gets 401, and no 100."""
    assert statuses(talk(service, post_head("", "Expect: 100-continue", length=1000))) == [401]


def test_an_expected_body_is_taken(service: Service, project: Project) -> None:
    """A key that was never seen before is looked up before the 100, and the body is taken."""
    body = json.dumps({"events": []}).encode()
    head = post_head(project.key, "Expect: 100-continue", "Connection: close", length=len(body))
    with socket.create_connection(("127.0.0.1", service.http_port), SECONDS) as connection:
        connection.sendall(head)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert statuses(answer.decode()) == [202]


# Bodies


def test_a_large_body_without_a_key_reads_its_answer(service: Service) -> None:
    """A client without a key that sends a large body can send it all, and reads its 401."""
    head = post_head("nobody", "Connection: close", length=8 * MEGABYTE)
    assert statuses(talk(service, head, b"x" * 8 * MEGABYTE)) == [401]


@pytest.mark.parametrize("path", ["/v1/events", "/health", "/nowhere"])
def test_bodies_without_a_key_take_no_memory(path: str, service: Service) -> None:
    """Of the bodies that nobody may send, nothing is kept."""
    (worker,) = service.find_workers()
    before = worker.memory_info().rss
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {2 * MEGABYTE}\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(60):
            place = ("127.0.0.1", service.http_port)
            connection = stack.enter_context(socket.create_connection(place, SECONDS))
            connection.sendall(head.encode() + b"x" * (MEGABYTE - 1000))
        # In each of its rounds the server reads a little from every connection.
        assert (
            statuses(talk(service, *[HEALTH.replace(b"close", b"keep-alive")] * 200, HEALTH))
            == [200] * 201
        )
        assert worker.memory_info().rss - before < 25 * MEGABYTE


def test_a_first_large_body_of_a_key_is_taken(tenant: Tenant) -> None:
    """A large request whose key must be looked up first is accepted like any other."""
    events = [
        tenant.make_event({"event_id": f"e{n}", "page.path": "/" * 1000}) for n in range(1000)
    ]
    assert tenant.post_events(events) == accepted(1000)


@pytest.mark.parametrize("size", [1, 65_000, 66_000, 5_000_000])
def test_compressed_bodies_of_any_size_are_taken(size: int, tenant: Tenant) -> None:
    """Compressed bodies are taken whether they unpack to little or to much."""
    body = json.dumps({"events": [tenant.make_event()], "filler": "x" * size}).encode()
    answer = tenant.post(gzip.compress(body), content_encoding="gzip")
    assert answer.json == accepted(1)


# Methods


@pytest.mark.parametrize("path", ["/health", "/ready", "/openapi.json"])
def test_head_is_get_without_the_body(path: str, service: Service) -> None:
    """HEAD is answered as GET is, without the body, and the connection goes on."""
    with closing(HTTPConnection("127.0.0.1", service.http_port, timeout=SECONDS)) as connection:
        answers = []
        for method in ("HEAD", "GET"):
            connection.request(method, path)
            connection.auto_open = 0
            answer = connection.getresponse()
            answers.append((answer.status, answer.headers["Content-Length"], answer.read()))
    (head, get) = answers
    assert head == (200, get[1], b"")
    assert get[2]


def test_head_of_the_metrics_is_get_without_the_body(service: Service) -> None:
    """Monitors that ask for the head of the metrics page get 200."""
    port = int(service.metrics_url.rpartition(":")[2].partition("/")[0])
    with closing(HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
        connection.request("HEAD", "/metrics")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")


def test_probes_on_the_metrics_port_tell_of_the_workers(
    create_migrated: Callable[[], str],
) -> None:
    """The metrics port says healthy and ready while a worker serves, and not when none is left."""
    with running_service({"DATABASE_URL": create_migrated()}) as service:
        port = service.metrics_url.rpartition("/")[0]
        wait_until(lambda: ask(f"{port}/ready") == 200)
        assert ask(f"{port}/health") == 200
        (worker,) = service.find_workers()
        worker.kill()
        wait_until(lambda: ask(f"{port}/health") == 503)
        wait_until(lambda: ask(f"{port}/health") == 200)


@pytest.mark.slow
def test_probes_on_the_metrics_port_see_a_hung_worker(
    create_migrated: Callable[[], str],
) -> None:
    """The metrics port says unhealthy and unready while one of two workers hangs."""
    with running_service({"DATABASE_URL": create_migrated(), "WORKERS": "2"}) as service:
        port = service.metrics_url.rpartition("/")[0]
        wait_until(lambda: ask(f"{port}/ready") == 200)
        victim, _ = service.find_workers()

        def find_hung() -> list[int]:
            log = service.read_log()
            return [said["worker_pid"] for said in log if said["message"] == "worker hangs"]

        victim.suspend()
        try:
            wait_until(lambda: ask(f"{port}/health") == ask(f"{port}/ready") == 503)
            wait_until(lambda: victim.pid in find_hung())
        finally:
            victim.resume()
        wait_until(lambda: ask(f"{port}/health") == ask(f"{port}/ready") == 200)


def test_a_preflight_keeps_its_connection_open(service: Service) -> None:
    """Preflights are answered on one connection, and may be remembered for a day."""
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with closing(HTTPConnection("127.0.0.1", service.http_port, timeout=SECONDS)) as connection:
        for _ in range(3):
            connection.request("OPTIONS", "/v1/events", headers=headers)
            connection.auto_open = 0
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (204, b"")
            assert answer.headers["Access-Control-Max-Age"] == "86400"
            assert answer.headers["Connection"] is None
