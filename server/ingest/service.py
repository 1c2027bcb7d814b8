"""The one door for events: what both protocols call, once they have a request's bytes."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from server.caller import Caller
from server.deadline import Deadline
from server.errors import Unavailable
from server.events.batch import ParsedBatch
from server.ingest.admission import Admission
from server.ingest.ingestion import Answer, Ingestion
from server.ingest.request_record import RequestRecord

# Larger requests are read one at a time, over both protocols: decoded, one can take thirty times
# its size, and what does not fit into the processor's cache is slow.
_LARGE_BYTES = 64 * 1024


class Codec(Protocol):
    """Reads the requests of one protocol."""

    def parse_batch(self, body: bytes, deadline: Deadline, project_id: str, /) -> ParsedBatch:
        """Return the events of a request; see JsonCodec and ProtobufCodec."""


class IngestService:
    """Takes requests of any protocol that `codecs` has."""

    def __init__(
        self,
        admission: Admission,
        ingestion: Ingestion,
        codecs: Mapping[str, Codec],
        *,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.admission = admission
        self._ingestion = ingestion
        self._codecs = codecs
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._large = threading.Lock()

    def find_deadline(
        self, *, arrived_at: float | None = None, seconds: float | None = None
    ) -> Deadline:
        """Return when a request must be answered: after the timeout, or after `seconds` if shorter.

        It has arrived at a moment of the service's clock, or now.
        """
        start = self._clock() if arrived_at is None else arrived_at
        limit = self._timeout_seconds
        return Deadline(start + (limit if seconds is None else min(seconds, limit)), self._clock)

    def ingest(
        self,
        caller: Caller,
        body: bytes,
        record: RequestRecord,
        deadline: Deadline,
        *,
        strict: bool = False,
    ) -> Answer:
        """Read a caller's request, validate its events and hand the valid ones over to be stored.

        Raises ResourceExhausted if it exceeds the caller's limits or quota, InvalidArgument if it
        is malformed as a whole, and Unavailable if it cannot be read in time or stored now; if
        `strict`, InvalidEvents for any invalid event. Blocks while another large request is read,
        if this one is large, too.
        """
        if len(body) <= _LARGE_BYTES:
            return self._read(caller, body, record, deadline, strict)
        if not self._large.acquire(timeout=max(0.0, deadline.left())):
            raise Unavailable("not answered in time")
        try:
            return self._read(caller, body, record, deadline, strict)
        finally:
            self._large.release()

    def _read(
        self, caller: Caller, body: bytes, record: RequestRecord, deadline: Deadline, strict: bool
    ) -> Answer:
        record.size_bytes = len(body)
        self.admission.check_quota(caller)
        self.admission.take_bytes(caller, len(body))
        batch = self._codecs[record.protocol].parse_batch(body, deadline, caller.project_id)
        self.admission.take_events(caller, batch.count)
        grant = self.admission.take_quota(caller, batch.count, len(body), deadline)
        answer = self._ingestion.ingest(
            caller.project_id, batch, deadline, strict=strict, grant=grant
        )
        record.decoded(answer.response, answer.problems)
        return answer
