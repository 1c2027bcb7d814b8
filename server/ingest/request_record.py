"""What logs, metrics and traces are told of each ingest request; never what it carries."""

import itertools
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from server.caller import Caller
from server.errors import ResourceExhausted, Unavailable
from server.events.problems import Problem

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# The gRPC codes that say what HTTP says with a status of 500 or more.
_FAULTS = frozenset({"UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

_log = logging.getLogger("productgraph.request_record")


class Sink(Protocol):
    """Takes finished requests, in a thread that serves others: it must not block."""

    def record(self, request: "RequestRecord") -> None:
        """Take one finished request."""


class RequestRecord:
    """One ingest request. An edge notes what happens; a sink reads it once it is finished.

    What is not known, because the request did not come that far, is None. Moments are in seconds on
    the recorder's clock, `started_at` is in nanoseconds since 1970.
    """

    __slots__ = (
        "_authenticated",
        "_decoded",
        "_recorder",
        "_started",
        "ended",
        "key_id",
        "problems",
        "project_id",
        "protocol",
        "reason",
        "request_id",
        "response",
        "route",
        "size_bytes",
        "started_at",
        "status",
        "traceparent",
    )

    def __init__(
        self,
        recorder: "RequestRecorder",
        protocol: str,
        route: str,
        request_id: str,
        traceparent: str | None,
    ) -> None:
        self.protocol = protocol
        self.route = route  # HTTP's path or gRPC's method
        self.request_id = request_id
        self.traceparent = traceparent
        self.project_id: str | None = None
        self.key_id: int | None = None
        self.reason: str | None = None  # why a request was refused that may be sent again
        self.size_bytes: int | None = None  # decompressed
        self.response: IngestEventsResponse | None = None
        self.problems: Sequence[Problem] = ()
        # HTTP's number or gRPC's name; 499 and CANCELLED: the client was gone before its answer.
        self.status: int | str = 0
        self.ended = 0.0
        self._recorder = recorder
        self._authenticated: float | None = None
        self._decoded: float | None = None
        self.started_at = time.time_ns()
        self._started = recorder.clock()

    def begin_part(self, number: int) -> "RequestRecord":
        """Record one message of a stream: its id is that of the stream with the number behind."""
        request_id = f"{self.request_id}.{number}"
        return RequestRecord(
            self._recorder, self.protocol, self.route, request_id, self.traceparent
        )

    def received(self) -> None:
        """Note that the whole request is there, if it was begun earlier: its time begins now."""
        self.started_at = time.time_ns()
        self._started = self._recorder.clock()

    def identified(self, caller: Caller) -> None:
        """Note whose key it is."""
        self.project_id = caller.project_id
        self.key_id = caller.key_id

    def authenticated(self, caller: Caller) -> None:
        """Note that the key is known; from now on, the request is read and decoded."""
        self.identified(caller)
        self._authenticated = self._recorder.clock()

    def refused(self, error: BaseException) -> None:
        """Note why the request is refused, if that may be over later."""
        if isinstance(error, ResourceExhausted | Unavailable):
            self.reason = str(error)

    def decoded(self, response: IngestEventsResponse, problems: Sequence[Problem] = ()) -> None:
        """Note that the events have been validated and handed over to be stored."""
        self.response = response
        self.problems = problems
        self._decoded = self._recorder.clock()

    def finish(self, status: int | str) -> None:
        """Note that the request is over, and report it; call this once."""
        self.status = status
        self.ended = self._recorder.clock()
        self._recorder.report(self)

    @property
    def seconds(self) -> float:
        """Return how long the request took."""
        return self.ended - self._started

    @property
    def seconds_authenticating(self) -> float | None:
        """Return how long it took until the key's project was known."""
        return None if self._authenticated is None else self._authenticated - self._started

    @property
    def seconds_decoding(self) -> float | None:
        """Return how long it took to read, decode and validate the events."""
        if self._authenticated is None or self._decoded is None:
            return None
        return self._decoded - self._authenticated

    @property
    def seconds_storing(self) -> float | None:
        """Return how long the events waited for their commit, or for its failure."""
        return None if self._decoded is None else self.ended - self._decoded

    @property
    def is_fault(self) -> bool:
        """Return whether the request failed through a fault of the service."""
        status = self.status
        return status >= 500 if isinstance(status, int) else status in _FAULTS


class RequestRecorder:
    """Makes the records of one process, and hands them to its sinks once they are finished."""

    def __init__(
        self, sinks: tuple[Sink, ...] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._sinks = sinks
        self._prefix = secrets.token_hex(8)
        self._numbers = itertools.count(1)

    def begin(
        self,
        protocol: str,
        route: str,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> RequestRecord:
        """Record a request that arrives; without a usable id of its client's it gets one."""
        if request_id is None or not _REQUEST_ID.fullmatch(request_id):
            request_id = f"{self._prefix}-{next(self._numbers)}"
        return RequestRecord(self, protocol, route, request_id, traceparent)

    def report(self, record: RequestRecord) -> None:
        """Hand a finished record to every sink; a sink that fails harms no request."""
        for sink in self._sinks:
            try:
                sink.record(record)
            except Exception:  # noqa: BLE001 - as promised
                _log.exception("a request could not be recorded")
