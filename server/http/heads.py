"""Heads: of requests, read line by line, and of answers.

The requests of a client differ in few lines of their heads, and so do those of many clients. A
line means the same wherever it stands, so what the latest ones mean is kept: nothing else of a
request is. The same goes for the shape of an answer's head, that is its status and its names.
"""

import time
from collections.abc import Iterable, Sequence
from functools import lru_cache

from waitress.parser import ParsingError, crack_first_line, split_uri
from waitress.rfc7230 import HEADER_FIELD_RE
from waitress.task import hop_by_hop
from waitress.utilities import build_http_date

# Longer lines are read each time: the kept ones take no more than this, times their count.
_KEPT_LINE_BYTES, _KEPT_LINES = 512, 1024

# The method, URI, HTTP version, path and query of a request.
Start = tuple[str, str, str, str, str]
Field = tuple[str, str]


def _read_field(line: bytes) -> Field | None:
    """Return a field's name, as WSGI has it, and its value; None for a name with an underscore.

    Such a name would be the same as one with a hyphen. Raises ParsingError.
    """
    if b"\r" in line or b"\n" in line:
        raise ParsingError("Bare CR or LF found in header line")
    field = HEADER_FIELD_RE.match(line)
    if field is None:
        raise ParsingError("Invalid header")
    name, value = field.group("name", "value")
    if b"_" in name:
        return None
    return (
        name.upper().replace(b"-", b"_").decode("latin-1"),
        value.strip(b" \t").decode("latin-1"),
    )


def _read_start(line: bytes) -> Start:
    """Read the first line of a request; raises ParsingError, or ValueError for a malformed URI."""
    line = line.rstrip()
    if b"\r" in line or b"\n" in line:
        raise ParsingError("Bare CR or LF found in HTTP message")
    method, uri, version = (part.decode("latin-1") for part in crack_first_line(line))
    if not method:
        raise ParsingError("Start line is invalid")
    _, _, path, query, _ = split_uri(uri.encode("latin-1"))
    return method, uri, version, path, query


_recall_field = lru_cache(_KEPT_LINES)(_read_field)
_recall_start = lru_cache(_KEPT_LINES)(_read_start)


def read_fields(lines: Iterable[bytes]) -> dict[str, str]:
    """Return the fields of a head; raises ParsingError.

    Values of the same name are joined by commas, as the values of a list may always be.
    """
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            continue
        field = _recall_field(line) if len(line) <= _KEPT_LINE_BYTES else _read_field(line)
        if field is not None:
            name, value = field
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def read_start(line: bytes) -> Start:
    """Read the first line of a request; raises ParsingError, or ValueError for a malformed URI."""
    return _recall_start(line) if len(line) <= _KEPT_LINE_BYTES else _read_start(line)


@lru_cache(_KEPT_LINES)
def _shape_head(start: str, names: tuple[str, ...]) -> tuple[str, int]:
    """Return a head whose values are missing, and how many lines it has."""
    for name in names:
        if name.lower() in hop_by_hop:
            raise ValueError(f"{name} is the server's own to send")
    start, *titles = (text.replace("%", "%%") for text in (start, *map(str.title, names)))
    lines = [start, *(f"{title}: %s" for title in titles), "Date: %s", "", ""]
    return "\r\n".join(lines), len(lines) - 1


@lru_cache(1)
def _format_date(second: int) -> str:
    return str(build_http_date(second))


def write_head(start: str, fields: Sequence[Field], connection: str) -> bytes:
    """Return the head of an answer; `connection` is its last field, or empty.

    Raises ValueError if a value has the end of a line in it.
    """
    names = tuple([name for name, _ in fields])
    shape, lines = _shape_head(start, names)
    head = shape % (*[value for _, value in fields], _format_date(int(time.time())))
    if not head.count("\n") == head.count("\r") == lines:
        raise ValueError("a line ends within a field of an answer")
    if connection:
        head = f"{head[:-2]}Connection: {connection}\r\n\r\n"
    return head.encode("latin-1")
