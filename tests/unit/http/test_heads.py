"""Heads that are read and written quickly mean what they meant before."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waitress.adjustments import Adjustments
from waitress.parser import HTTPRequestParser, ParsingError, TransferEncodingNotImplemented

from server.http.framing import RequestParser
from server.http.heads import write_head
from tests.unit.http.test_server import connect, serving

ADJUSTMENTS = Adjustments()
ODD = st.binary(max_size=8)
NAMES = st.sampled_from(
    ["Host", "host", "Content-Length", "Connection", "Expect", "X-A", "x-a", "X_A", "X:", ""]
).map(str.encode)
VALUES = st.one_of(
    st.sampled_from([b"", b"x", b" a, b\t", b"close", b"Keep-Alive", b"100-continue"]),
    st.sampled_from([b"0", b"12", b"1_2", b"\xd9\xa1", b"9" * 5000]),
)
LINES = st.one_of(
    st.tuples(NAMES | ODD, st.sampled_from([b":", b": ", b" : "]), VALUES | ODD).map(b"".join),
    st.sampled_from([b"", b" folded", b"\tfolded", b"X: a\rb", b"X: a\nb", b"Host: x"]),
)
STARTS = st.one_of(
    st.tuples(
        st.sampled_from([b"GET", b"POST", b"get", b"G T"]),
        st.sampled_from([b"/", b"//a//b?c#d", b"/%2f%41?x=%20", b"http://h:1/p", b"http://[::1/p"]),
        st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1 ", b""]),
    ).map(b" ".join),
    ODD,
)
FIELDS = ("headers", "command", "request_uri", "version", "path", "query", "content_length")
SAFE = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=8)


def read(kind: Callable[[Any], Any], head: bytes) -> dict[str, Any] | None:
    """Return what a parser reads in a head, or None if it refuses it."""
    parser = kind(ADJUSTMENTS)
    try:
        parser.parse_header(head)
    except (ParsingError, TransferEncodingNotImplemented, ValueError):
        return None
    known = {name: getattr(parser, name) for name in FIELDS}
    return known | {"expects": parser.expect_continue, "has_body": parser.body_rcv is not None}


@given(start=STARTS, lines=st.lists(LINES, max_size=6))
def test_heads_are_read_as_waitress_reads_them(start: bytes, lines: list[bytes]) -> None:
    """Whatever a head is, it means what waitress reads in it, the first time and the next."""
    head = b"\r\n".join([start, *lines, b"Host: h", b"", b""])
    expected = read(HTTPRequestParser, head)
    if expected is not None and "," in expected["headers"]["HOST"] and expected["version"] == "1.1":
        expected = None
    assert read(RequestParser, head) == expected
    assert read(RequestParser, head) == expected


@given(fields=st.lists(st.tuples(st.sampled_from(["x-a", "vary", "x%s"]), SAFE)), last=SAFE)
def test_an_answer_has_its_own_values(fields: list[tuple[str, str]], last: str) -> None:
    """Every field of an answer has the value that this answer was given, and there is a date."""
    head = write_head("HTTP/1.1 200 OK", fields, last)
    start, *lines = head.decode("latin-1").split("\r\n")
    assert start == "HTTP/1.1 200 OK"
    expected = [f"{name.title()}: {value}" for name, value in fields]
    assert lines[: len(fields)] == expected
    assert lines[len(fields)].startswith("Date: ")
    assert lines[len(fields) + 1 :] == ([f"Connection: {last}"] if last else []) + ["", ""]


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\rb"])
def test_a_value_cannot_end_its_line(value: str) -> None:
    """A value with the end of a line is refused, not sent as another field."""
    with pytest.raises(ValueError, match="a line ends"):
        write_head("HTTP/1.1 200 OK", [("x-a", value)], "")


def test_an_application_cannot_send_the_servers_fields() -> None:
    """What belongs to a connection is the server's to send."""
    with pytest.raises(ValueError, match="server's own"):
        write_head("HTTP/1.1 200 OK", [("Transfer-Encoding", "chunked")], "")


def echo(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answer with all that a WSGI environment says of a request."""
    seen = {name: value for name, value in environ.items() if isinstance(value, str)}
    del seen["REMOTE_PORT"]
    body = json.dumps([seen, environ["wsgi.input"].read().decode("latin-1")]).encode()
    # A later request must not see what this one is given.
    environ["HTTP_LEFT_BEHIND"] = environ["QUERY_STRING"] = "left behind"
    start_response("200 OK", [("X-Seen", environ.get("HTTP_X_A", "-"))])
    return [body]


@pytest.fixture(scope="module")
def echo_port() -> Iterator[int]:
    """Provide the port of a server that echoes requests."""
    with serving(echo, gate=lambda _: True) as port:
        yield port


OPTIONAL = {
    "X-A": ["1", "2"],
    "X-Request-ID": ["first", "second"],
    "X-PG-API-Key": ["a", "b"],
    "Content-Type": ["application/json", "text/plain"],
    "Content-Encoding": ["identity"],
    "Origin": ["https://a.example"],
    "traceparent": ["00-1", "00-2"],
    "Expect": ["something"],
    "Connection": ["keep-alive"],
    "Cookie": ["c=1"],
}
HEADERS = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(values) for name, values in OPTIONAL.items()}
)
REQUESTS = st.tuples(
    st.sampled_from(["GET", "POST", "HEAD", "OPTIONS"]),
    st.sampled_from(["/", "/a", "/a?b=c", "//a"]),
    HEADERS,
    st.none() | st.sampled_from(["", "x", "xyz"]),
)


def write_request(request: tuple[str, str, dict[str, str], str | None]) -> bytes:
    """Return a request as a client sends it; without a body it has no length either."""
    method, target, headers, body = request
    lines = [f"{method} {target} HTTP/1.1", "Host: h"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", body or ""]).encode()


def exchange(port: int, requests: list[bytes]) -> list[str]:
    """Return the answers to requests that are sent at once, without their dates."""
    last = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    with connect(port) as connection:
        connection.sendall(b"".join([*requests, last]))
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    received = re.sub(r"Date: .*", "Date:", received)
    return received.split("HTTP/1.1 200 OK")[1:-1]


@given(requests=st.lists(REQUESTS, min_size=2, max_size=5))
def test_no_request_sees_anything_of_another(requests: list[Any], echo_port: int) -> None:
    """Of pipelined requests each is given what it would be given alone."""
    written = [write_request(request) for request in requests]
    alone = [exchange(echo_port, [each]) for each in written]
    assert exchange(echo_port, written) == [answer for [answer] in alone]
