"""Requests of realistic events, prepared once and numbered in place.

An event has 17 fields, about 600 bytes as JSON and 356 as protobuf. All events of a request are
equally long, so that a new number and a new time reach a thousand of them by a few strided writes:
what sends them spends its time on the sockets.
"""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

from google.protobuf.json_format import ParseDict

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsRequest

PROJECT = "proj_bench"
_NUMBER_MARK = b"@@@@@@@@"
_TIME_MARK = datetime(2001, 1, 1, tzinfo=UTC)
# So many consecutive requests share a second, which keeps hours of a run within one month.
_REQUESTS_PER_SECOND = 10
_LONG_EVENT_BYTES = 10_600

# What SDKs send beside the fields of an event: nulls, names of their own, texts that need escapes.
_DIRT: dict[str, Any] = {
    "user.id": None,
    "page.referrer": None,
    "page.title": 'Espresso "Crema"\nmachines',
    "user.anonymous_id": "anon-5f2b6c0e",
    "ui.viewport": "1440x900",
    "ui.scroll.position": 1280,
}

EncodeTime = Callable[[datetime], bytes]
# A project and one of its keys.
Tenant = tuple[str, str]


def make_events(count: int) -> list[dict[str, Any]]:
    """Return the events of a request that has no number yet."""
    return [_make_event(index, count) for index in range(count)]


def make_long_events(count: int) -> list[dict[str, Any]]:
    """Return such events of about 10 kB each, most of which is a stack trace and metadata."""
    return [_lengthen(event) for event in make_events(count)]


def make_dirty_events(count: int) -> list[dict[str, Any]]:
    """Return such events as real SDKs send them: with nulls, unnamed fields and escapes."""
    return [event | _DIRT for event in make_events(count)]


def _make_event(index: int, count: int) -> dict[str, Any]:
    # Equally long in every format: no 0 at the end, and five bytes as protobuf's nanoseconds.
    millisecond = 301 + index * 69 // count * 10
    return {
        "event_id": f"evt_{_NUMBER_MARK.decode()}-{index:04}-4b7e-9c1d-6f0a2b",
        "project_id": PROJECT,
        "session.id": f"sess_8f14e45f{index % 50:04}",
        "event.type": "ui.click",
        "event.timestamp": f"{_TIME_MARK:%Y-%m-%dT%H:%M:%S}.{millisecond}Z",
        "user.id": f"user_{10_000 + index}",
        "event.name": "Add to cart",
        "event.sequence": 1000 + index,
        "page.path": "/products/espresso",
        "page.title": "Espresso machine",
        "page.url": "https://shop.example.com/products/espresso",
        "page.referrer": "https://shop.example.com/products",
        "ui.component.name": "AddToCartButton",
        "ui.component.path": "ProductPage/Card",
        "ui.action": "click",
        "ui.element.text": "Add to cart",
        "metadata": {"plan": "pro", "position": 100 + index % 900, "is_mobile": False},
    }


def _lengthen(event: dict[str, Any]) -> dict[str, Any]:
    try:
        json.loads("{")
    except ValueError as error:
        stack = "".join(traceback.format_exception(error))
    frames = [f"    at render (https://shop.example.com/assets/app.js:{n}:17)" for n in range(90)]
    longer = {
        "error.type": "TypeError",
        "error.message": "Cannot read properties of undefined (reading 'price')",
        "error.stack": "\n".join([stack, *frames]),
    }
    missing = _LONG_EVENT_BYTES - len(json.dumps(event | longer))
    breadcrumbs = [
        f"GET /api/products/{number}?expand=prices 200" for number in range(missing // 46)
    ]
    return event | longer | {"metadata": event["metadata"] | {"breadcrumbs": breadcrumbs}}


KINDS: Mapping[str, Callable[[int], list[dict[str, Any]]]] = {
    "usual": make_events,
    "dirty": make_dirty_events,
    "long": make_long_events,
}


class NumberedRequest:
    """The bytes of a request, which a number makes unlike any other's."""

    def __init__(self, content: bytes, count: int, encode_time: EncodeTime) -> None:
        self.buffer = bytearray(content)
        self._encode_time = encode_time
        self._numbers = _Columns(self.buffer, _NUMBER_MARK, count)
        self._times = _Columns(self.buffer, encode_time(_TIME_MARK), count)
        self._second = -1
        self._start = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)

    def number(self, number: int) -> None:
        """Give every event a new id, and a time of this month that is later than all before."""
        self._numbers.write(b"%08x" % number)
        second = number // _REQUESTS_PER_SECOND
        if second != self._second:
            self._times.write(self._encode_time(self._start + timedelta(seconds=second)))
            self._second = second


class _Columns:
    """Equal texts at equal distances in a buffer."""

    def __init__(self, buffer: bytearray, mark: bytes, count: int) -> None:
        places = [buffer.find(mark)]
        while (place := buffer.find(mark, places[-1] + 1)) >= 0:
            places.append(place)
        strides = {second - first for first, second in pairwise(places)}
        if len(places) != count or len(strides) > 1:
            raise ValueError(f"{mark!r} is {len(places)} times in {count} events, {strides} apart")
        self._buffer = buffer
        self._written = mark
        self._count = count
        stride = max(strides, default=None)
        length = places[-1] - places[0] + 1
        self._slices = [
            slice(place, place + length, stride)
            for place in range(places[0], places[0] + len(mark))
        ]

    def write(self, text: bytes) -> None:
        for column, old, new in zip(self._slices, self._written, text, strict=True):
            if old != new:
                self._buffer[column] = bytes((new,)) * self._count
        self._written = text


def encode_http(events: list[dict[str, Any]], key: str) -> NumberedRequest:
    """Return an HTTP request with the JSON as a browser writes it."""
    body = json.dumps({"events": events}, separators=(",", ":")).encode()
    head = (
        "POST /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"X-PG-API-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    content = head.encode() + body
    return NumberedRequest(content, len(events), lambda time: f"{time:%FT%T}".encode())


class TenantRequest:
    """An HTTP request that several projects, with names of one length, send in turn."""

    def __init__(self, count: int, tenants: Sequence[Tenant]) -> None:
        project, key = tenants[0]
        self._request = encode_http([e | {"project_id": project} for e in make_events(count)], key)
        self.buffer = self._request.buffer
        self._projects = _Columns(self.buffer, project.encode(), count)
        self._keys = _Columns(self.buffer, key.encode(), 1)
        self._tenants = tenants

    def number(self, number: int) -> None:
        """Give every event a new id and time, and the project whose turn it is."""
        self._request.number(number)
        project, key = self._tenants[number % len(self._tenants)]
        self._projects.write(project.encode())
        self._keys.write(key.encode())


def encode_protobuf(events: list[dict[str, Any]]) -> NumberedRequest:
    """Return an IngestEventsRequest."""
    content = ParseDict({"events": events}, IngestEventsRequest()).SerializeToString()
    return NumberedRequest(content, len(events), _encode_seconds)


def encode_rows(lines: bytes, count: int) -> NumberedRequest:
    """Return lines of COPY, as PostgreSQL wrote them for events without a number."""
    return NumberedRequest(lines, count, lambda time: f"{time:%F %T}".encode())


def _encode_seconds(time: datetime) -> bytes:
    """Return the field `seconds` of a Timestamp: five bytes from 1978 to 3058."""
    seconds = int(time.timestamp())
    digits = [seconds >> shift & 0x7F | 0x80 for shift in (0, 7, 14, 21, 28)]
    digits[-1] &= 0x7F
    return bytes((0x08, *digits))
