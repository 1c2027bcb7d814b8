"""HTTP servers that stand in for Amplitude and Mixpanel: their limits, their answers, their faults.

Each keeps the documented rules of its provider and can be told, request by request, to answer or to
fail in any other way.
"""

import base64
import re
import select
import socket
import struct
import sys
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

import orjson

Event = dict[str, Any]

HTML = b"<!doctype html><title>Welcome to the hotel's Wi-Fi</title>"
# What a server remembers of what it was sent; the ids of ingested events are all kept.
_MAX_DELIVERIES = 100_000
_HOUR_SECONDS = 3600
_FIRST_TIME = 31_536_000_000  # 1971, in milliseconds
_CONTAINERS = (dict, list)
_INSERT_ID = re.compile(r"[A-Za-z0-9-]{1,36}")
_REFUSED_IDS = frozenset(
    {"anonymous", "nil", "none", "null", "n/a", "undefined", "unknown", "0", "-1", "{}"}
    | {"00000000-0000-0000-0000-000000000000"}
)


class Fault(Enum):
    """How an answer fails to arrive."""

    HANG = "nothing is sent, until the client gives up"
    RESET = "the connection is reset instead"
    CUT_SHORT = "half of the body is sent"
    DRIP = "a byte a second is sent"


@dataclass(frozen=True)
class Reply:
    """An answer; `ingest` names by index the events that the provider has afterwards."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    ingest: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Script:
    """What becomes of one request: without a reply, the documented one; without a fault, at once.

    A scripted reply goes around every check, the one of the credentials included.
    """

    reply: Reply | None = None
    fault: Fault | None = None


class Delivery(NamedTuple):
    """An event as it arrived, refused or not; `arrived_at` is of `time.monotonic`."""

    insert_id: str
    payload: bytes
    arrived_at: float
    status: int


@dataclass(frozen=True)
class Request:
    """What could be read of a request; `size` is that of the body when decompressed."""

    path: str
    headers: Mapping[str, str]
    size: int
    document: Any
    events: Sequence[Event]


class StandIn(ABC):
    """A server on a port of the loopback interface; a context manager."""

    max_bytes: int

    def __init__(self, port: int = 0) -> None:
        # The next requests, one each.
        self.scripts: deque[Script] = deque()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._http = _HttpServer(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every connection and free the port; do nothing the second time."""
        if self.closing.is_set():
            return
        self.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.cut_connections()
        self._http.server_close()

    @property
    def port(self) -> int:
        """The number of its port; another server may listen there once this one is closed."""
        return self._http.server_port

    @abstractmethod
    def take(
        self, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[Reply, Fault | None]:
        """Take a POST; return the answer, and how it fails to arrive."""

    @abstractmethod
    def refuse_unread(self) -> Reply:
        """Return the answer to a body that is too large to be read."""

    def take_get(self, _path: str, _headers: Mapping[str, str]) -> tuple[Reply, Fault | None]:
        """Take a GET, in the same way."""
        return Reply(405, HTML), None


class ProviderServer(StandIn):
    """What a provider takes events by."""

    path: str
    max_events = 2000

    def __init__(self, credential: str, port: int = 0) -> None:
        self.credential = credential
        # Asked after the scripts; then the documented happens.
        self.behave: Callable[[Sequence[Event]], Script | None] = lambda _events: None
        self.deliveries: deque[Delivery] = deque(maxlen=_MAX_DELIVERIES)
        self.statuses: deque[int] = deque(maxlen=_MAX_DELIVERIES)
        self.ingested: dict[Hashable, str] = {}
        super().__init__(port)

    @property
    def url(self) -> str:
        """The whole URL that events are sent to."""
        return f"http://127.0.0.1:{self.port}{self.path}"

    @property
    def insert_ids(self) -> set[str]:
        """The insert ids of all ingested events; `ingested` has more where one was not frozen."""
        with self._lock:
            return set(self.ingested.values())

    def count_duplicates(self) -> int:
        """Return how many ingested events have the insert id of another one."""
        with self._lock:
            return len(self.ingested) - len(set(self.ingested.values()))

    def payloads_of(self, insert_id: str) -> set[bytes]:
        """Return the different payloads that came with an insert id."""
        with self._lock:
            return {d.payload for d in self.deliveries if d.insert_id == insert_id}

    def take(
        self, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[Reply, Fault | None]:
        """Ingests what a request brings; returns the answer, and how it fails to arrive."""
        request = self._read_request(path, headers, body)
        with self._lock:
            scripted = self.scripts.popleft() if self.scripts else self.behave(request.events)
            script = scripted or Script()
            reply = script.reply or self._answer(request)
            self.statuses.append(reply.status)
            self._record(request.events, reply)
        return reply, script.fault

    def refuse_unread(self) -> Reply:
        """Return the answer to a body that is too large to be read."""
        with self._lock:
            self.statuses.append(413)
        return self._refuse(413, "request exceeds max limit")

    def _record(self, events: Sequence[Event], reply: Reply) -> None:
        now = time.monotonic()
        for index, event in enumerate(events):
            insert_id = str(self._read_insert_id(event))
            payload = orjson.dumps(event)
            self.deliveries.append(Delivery(insert_id, payload, now, reply.status))
            if index in reply.ingest:
                self.ingested.setdefault(self._read_identity(event), insert_id)

    def _read_request(self, path: str, headers: Mapping[str, str], body: bytes) -> Request:
        document, events = None, []
        with suppress(zlib.error):
            body = self._decode(headers, body)
        with suppress(orjson.JSONDecodeError):
            document = orjson.loads(body)
            events = self._find_events(document)
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            events = []
        return Request(path, headers, len(body), document, events)

    def _decode(self, _headers: Mapping[str, str], body: bytes) -> bytes:
        return body

    @staticmethod
    def _refuse(code: int, error: str, /, **more: Any) -> Reply:
        return Reply(code, orjson.dumps({"code": code, "error": error, **more}))

    @abstractmethod
    def _find_events(self, document: Any) -> Any: ...

    @abstractmethod
    def _read_insert_id(self, event: Event) -> Any: ...

    @abstractmethod
    def _read_identity(self, event: Event) -> Hashable:
        """By what duplicates are recognised."""

    @abstractmethod
    def _answer(self, request: Request) -> Reply:
        """Return the documented answer."""


class AmplitudeServer(ProviderServer):
    """Amplitude's Batch Event Upload, for the project whose API key is `credential`."""

    path = "/batch"
    max_bytes = 20_000_000

    def _find_events(self, document: Any) -> Any:
        return document.get("events") if isinstance(document, dict) else None

    def _read_insert_id(self, event: Event) -> Any:
        return event.get("insert_id")

    def _read_identity(self, event: Event) -> Hashable:
        return event.get("device_id"), event.get("insert_id")

    def _answer(self, request: Request) -> Reply:
        if request.path != self.path:
            return Reply(404, HTML)
        if len(request.events) > self.max_events:
            return self._refuse(413, "Payload too large")
        if request.headers.get("Content-Type") != "application/json" or not request.events:
            return self._refuse(400, "Invalid JSON request body")
        if (key := request.document.get("api_key")) != self.credential:
            return self._refuse(400, f"Invalid API key: {key}")
        shortest = request.document.get("options", {}).get("min_id_length", 5)
        for kind, find in _AMPLITUDE_RULES:
            refused = [
                (i, name) for i, e in enumerate(request.events) if (name := find(e, shortest))
            ]
            if refused:
                # Only the first bad field is named.
                name = refused[0][1]
                indexes = {name: [index for index, other in refused if other == name]}
                return self._refuse(400, "Request had invalid events", **{kind: indexes})
        return self._accept(request)

    @staticmethod
    def _accept(request: Request) -> Reply:
        count, now = len(request.events), int(time.time() * 1000)
        report = {"code": 200, "events_ingested": count}
        report |= {"payload_size_bytes": request.size, "server_upload_time": now}
        return Reply(200, orjson.dumps(report), ingest=frozenset(range(count)))


def _find_missing(event: Event, _shortest: int) -> str | None:
    if not event.get("event_type"):
        return "event_type"
    return None if event.get("user_id") or event.get("device_id") else "user_id"


def _find_invalid(event: Event, _shortest: int) -> str | None:
    for name in ("user_id", "device_id"):
        value = event.get(name, "fine")
        if not isinstance(value, str) or value.lower() in _REFUSED_IDS:
            return name
    for name in ("time", "session_id"):
        if type(event.get(name, -1)) is not int:
            return name
    properties = event.get("event_properties", {})
    fits = isinstance(properties, dict) and measure_depth(properties) <= 40
    return None if fits else "event_properties"


def _find_short(event: Event, shortest: int) -> str | None:
    names = ("user_id", "device_id")
    return next((name for name in names if len(event.get(name, "x" * shortest)) < shortest), None)


_AMPLITUDE_RULES: Sequence[tuple[str, Callable[[Event, int], str | None]]] = (
    ("events_with_missing_fields", _find_missing),
    ("events_with_invalid_fields", _find_invalid),
    ("events_with_invalid_id_lengths", _find_short),
)


class MixpanelServer(ProviderServer):
    """Mixpanel's Import Events, for the project whose token is `credential`."""

    path = "/import"
    max_bytes = 2_000_000

    def _find_events(self, document: Any) -> Any:
        return document

    def _read_insert_id(self, event: Event) -> Any:
        properties = event.get("properties")
        return properties.get("$insert_id") if isinstance(properties, dict) else None

    def _read_identity(self, event: Event) -> Hashable:
        properties = event["properties"]
        keys = ("time", "distinct_id", "$insert_id")
        return (event["event"], *(properties.get(key) for key in keys))

    def _decode(self, headers: Mapping[str, str], body: bytes) -> bytes:
        if headers.get("Content-Encoding") != "gzip":
            return body
        return zlib.decompressobj(wbits=31).decompress(body, self.max_bytes + 1)

    def _answer(self, request: Request) -> Reply:
        path, _, query = request.path.partition("?")
        if path != self.path:
            return Reply(404, HTML)
        if request.headers.get("Authorization") != f"Basic {self._credentials}":
            return self._refuse(401, "Invalid credentials", status="Unauthorized")
        if request.size > self.max_bytes or len(request.events) > self.max_events:
            return self._refuse(413, f"request exceeds max limit of {self.max_bytes} bytes")
        if "strict=1" not in query.split("&") or not request.events:
            return self._refuse(400, "not a strict import of a JSON array", status="Bad Request")
        failed = {
            index: {
                "index": index,
                "insert_id": self._read_insert_id(event),
                "field": name,
                "message": f"'{name}' is invalid",
            }
            for index, event in enumerate(request.events)
            if (name := _find_refused(event))
        }
        imported = frozenset(range(len(request.events))) - failed.keys()
        return self._report(imported, list(failed.values()))

    @staticmethod
    def _report(imported: frozenset[int], failed: list[Event]) -> Reply:
        report: Event = {"code": 200, "num_records_imported": len(imported), "status": "OK"}
        if failed:
            report |= {"code": 400, "status": "Bad Request", "failed_records": failed}
            report["error"] = "some data points in the request failed validation"
        return Reply(report["code"], orjson.dumps(report), ingest=imported)

    @property
    def _credentials(self) -> str:
        return base64.b64encode(f"{self.credential}:".encode()).decode()


def _find_refused(event: Event) -> str | None:
    """Return the field for which strict mode refuses an event."""
    name, properties = event.get("event"), event.get("properties")
    if not isinstance(name, str) or not name or len(orjson.dumps(event)) > 1_000_000:
        return "event"
    if not isinstance(properties, dict) or len(properties) >= 255:
        return "properties"
    at, soon = properties.get("time"), (time.time() + _HOUR_SECONDS) * 1000
    if type(at) is not int or not _FIRST_TIME <= at <= soon:
        return "properties.time"
    if not _INSERT_ID.fullmatch(str(properties.get("$insert_id", ""))):
        return "properties.$insert_id"
    for key in ("distinct_id", "$device_id", "$user_id"):
        value = properties.get(key, None if key == "distinct_id" else "fine")
        if not isinstance(value, str) or value.lower() in _REFUSED_IDS:
            return f"properties.{key}"
    return None if measure_depth(properties) <= 3 else "properties"


def measure_depth(value: Any) -> int:
    """How many levels of objects and arrays there are, the value's own counted."""
    if not isinstance(value, _CONTAINERS):
        return 0
    items = value.values() if isinstance(value, dict) else value
    inner = [item for item in items if isinstance(item, _CONTAINERS)]
    return 1 + max(map(measure_depth, inner), default=0)


class _HttpServer(ThreadingHTTPServer):
    """Keeps its connections at hand, to be able to end them."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], provider: StandIn) -> None:
        self.provider = provider
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        """End what is open, so that no thread waits for a client."""
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave; for the rest, the report of the standard library is wanted."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HttpServer

    def do_GET(self) -> None:
        """Take a request without a body."""
        headers = dict(self.headers.items())
        self._send(*self.server.provider.take_get(self.path, headers))

    def do_POST(self) -> None:
        """Take one request."""
        provider = self.server.provider
        length = int(self.headers.get("Content-Length", 0))
        if length > provider.max_bytes:
            while length > 0 and (chunk := self.rfile.read(min(length, 65_536))):
                length -= len(chunk)
            self._send(provider.refuse_unread())
            return
        body = self.rfile.read(length)
        if len(body) < length:  # the client has left
            self.close_connection = True
            return
        reply, fault = provider.take(self.path, dict(self.headers.items()), body)
        self._send(reply, fault)

    def _send(self, reply: Reply, fault: Fault | None = None) -> None:
        self.close_connection = self.close_connection or fault is not None
        if fault is Fault.HANG:
            self._wait_for_end(None)
            return
        if fault is Fault.RESET:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self._send_body(reply.body, fault)

    def _send_body(self, body: bytes, fault: Fault | None) -> None:
        if fault is Fault.DRIP:
            for position in range(len(body)):
                self.wfile.write(body[position : position + 1])
                if self._wait_for_end(1.0):
                    return
        else:
            self.wfile.write(body[: len(body) // 2] if fault is Fault.CUT_SHORT else body)

    def _wait_for_end(self, seconds: float | None) -> bool:
        """Whether the client leaves, or the server is closed, within this time."""
        end = None if seconds is None else time.monotonic() + seconds
        while end is None or time.monotonic() < end:
            if self.server.provider.closing.wait(0.02):
                return True
            if select.select([self.connection], [], [], 0)[0]:
                return True
        return False

    def log_message(self, *_: Any) -> None:
        """Says nothing."""
