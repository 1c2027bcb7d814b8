"""The one door for events: whose they are, which of them are valid, and when they are stored."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from productgraph.v1.event_ingestion_service_pb2 import EventError, IngestEventsResponse
from server.caller import Caller
from server.errors import Unavailable
from server.events.copy_rows import Row, RowEncoder
from server.events.parsed import ParsedBatch, ParsedEvent
from server.events.schema import Schema
from server.events.timestamps import truncate_timestamp
from server.events.validation import InvalidEvent, MalformedEvent, Validator
from server.ingest.group_commit import Writer
from server.ingest.key_cache import KeyCache
from server.ingest.limits import Allowance, RateLimiter

T = TypeVar("T")

# Reading the events of a batch may take seconds from this size on.
_LARGE_BYTES = 1 << 20

# Called with a project's rejected events, which it can have the bytes of; it may not wait.
OnRejected = Callable[[str, ParsedBatch, Sequence[EventError]], None]


class Ingestion(NamedTuple):
    """The answer to a request, to be given once `stored` is done, unless that fails."""

    response: IngestEventsResponse
    stored: "Future[None]"


class IngestService:
    """What both protocols call."""

    def __init__(
        self,
        schema: Schema,
        keys: KeyCache,
        writer: Writer,
        *,
        timeout_seconds: float,
        on_rejected: OnRejected | None = None,
        limiter: RateLimiter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._writer = writer
        self._validator = Validator(schema)
        self._rows = RowEncoder(schema)
        self.timeout_seconds = timeout_seconds
        self._on_rejected = on_rejected
        self._limiter = limiter
        self._clock = clock

    def deadline_after(self, seconds: float | None = None, since: float | None = None) -> float:
        """When a request must be answered: after the timeout, or earlier.

        It has arrived now, or at `since`, on the clock of the service.
        """
        limit = self.timeout_seconds
        start = self._clock() if since is None else since
        return start + (limit if seconds is None else min(seconds, limit))

    def seconds_left(self, deadline: float) -> float:
        """How long it is until a deadline; negative once it has passed."""
        return deadline - self._clock()

    def check_in_time(self, deadline: float, seconds: float = 0.0) -> None:
        """Raises Unavailable where a request that takes so long to read would miss its deadline.

        It has waited for others: reading it as well would make the next ones late too.
        """
        if seconds >= self.seconds_left(deadline):
            raise Unavailable("not answered in time")

    def authenticate(self, key: str) -> Caller | None:
        """Whose an API key is; None where `look_up_key` must be asked.

        Raises Unauthenticated for a key that is empty, malformed, unknown or revoked.
        """
        return self._keys.known_caller(key)

    def look_up_key(self, key: str) -> "Future[Caller]":
        """Whose a key is that is not known yet; see KeyCache.look_up."""
        return self._keys.look_up(key)

    def admit(self, caller: Caller, size: int) -> None:
        """Counts a request of so many bytes, before it is read; raises ResourceExhausted."""
        if self._limiter is not None:
            self._limiter.take_bytes(caller, size)

    def allowances_of(self, caller: Caller) -> Sequence[Allowance]:
        """What is left to a caller at this moment; empty where nothing limits it."""
        return () if self._limiter is None else self._limiter.allowances_of(caller)

    def wait(self, future: "Future[T]", deadline: float) -> T:
        """The result of a future, for callers who have a thread to wait with.

        Raises what the future fails with, and Unavailable once the deadline has passed.
        """
        try:
            return future.result(max(0.0, self.seconds_left(deadline)))
        except TimeoutError:
            raise Unavailable("not answered in time") from None

    def ingest(self, caller: Caller, events: ParsedBatch, deadline: float) -> Ingestion:
        """Validates events and hands the valid ones over to be stored.

        Raises Unavailable where they cannot be stored now, or not be read in time, and
        ResourceExhausted, before any is looked at, where they are too many.
        """
        if self._limiter is not None:
            self._limiter.take_events(caller, events.count)
        rows: list[Row] = []
        errors: list[EventError] = []
        for index, event in enumerate(self._read_in_time(events, deadline)):
            try:
                rows.append(self._check(event, caller.project_id))
            except InvalidEvent as problem:
                errors.append(EventError(index=index, error=str(problem)))
        response = IngestEventsResponse(accepted=len(rows), rejected=len(errors), errors=errors)
        stored = self._store(rows, deadline)
        if errors and self._on_rejected is not None:
            self._on_rejected(caller.project_id, events, errors)
        return Ingestion(response, stored)

    def _read_in_time(
        self, batch: ParsedBatch, deadline: float
    ) -> Iterator[ParsedEvent | MalformedEvent]:
        return batch.events if batch.size < _LARGE_BYTES else self._read_until(deadline, batch)

    def _read_until(
        self, deadline: float, batch: ParsedBatch
    ) -> Iterator[ParsedEvent | MalformedEvent]:
        for event in batch.events:
            self.check_in_time(deadline)
            yield event

    def _check(self, parsed: ParsedEvent | MalformedEvent, project_id: str) -> Row:
        if isinstance(parsed, MalformedEvent):
            raise InvalidEvent(self._validator.explain_malformed(parsed, project_id))
        self._validator.check_event(parsed.event, parsed.columns, project_id)
        row = self._rows.encode(parsed)
        if (
            self._validator.surely_fits(parsed.size, len(row.text))
            and not self._writer.needs_encoded
        ):
            return row
        truncate_timestamp(parsed.event.event_timestamp)  # as the row does
        encoded = parsed.complete().SerializeToString()
        self._validator.check_size(len(encoded))
        return Row(row.key, row.text, encoded)

    def _store(self, rows: list[Row], deadline: float) -> "Future[None]":
        if rows:
            return self._writer.submit(rows, deadline)
        nothing: Future[None] = Future()
        nothing.set_result(None)
        return nothing
