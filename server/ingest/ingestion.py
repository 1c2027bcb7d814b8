"""Validating the events of a request, and handing the valid ones over to be stored."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from productgraph.v1.event_ingestion_service_pb2 import EventError, IngestEventsResponse
from server.deadline import Deadline
from server.errors import IngestError, Internal, InvalidEvents
from server.events.batch import ParsedBatch, ReadEvent
from server.events.copy_rows import Row, RowEncoder
from server.events.parsed import MalformedEvent, ParsedEvent
from server.events.problems import InvalidEvent, Problem
from server.events.schema import Schema
from server.events.timestamps import truncate_timestamp
from server.events.validation import Validator
from server.ingest.group_commit import Writer
from server.ingest.quota_account import Grant
from server.privacy.block_list import BlockedPersons, FindBlocked, find_nobody

# Reading the events of a batch may take seconds from this size on.
_LARGE_BYTES = 1 << 20

_log = logging.getLogger("productgraph.ingestion")

# Takes a project's rejected events; the bytes of one are to be had from the batch. Must not block.
OnRejected = Callable[[str, ParsedBatch, Sequence[EventError]], None]


class Answer(NamedTuple):
    """The answer to a request, to be given once `stored` is done, unless that fails."""

    response: IngestEventsResponse
    problems: Sequence[Problem]
    stored: "Future[None]"


class Ingestion:
    """Takes batches of events; `on_rejected` takes those that are not valid."""

    def __init__(
        self,
        schema: Schema,
        writer: Writer,
        *,
        on_rejected: OnRejected | None = None,
        find_blocked: FindBlocked = find_nobody,
        on_blocked: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._writer = writer
        self._validator = Validator(schema)
        self._rows = RowEncoder(schema)
        self._on_rejected = on_rejected
        self._find_blocked = find_blocked
        self._on_blocked = on_blocked

    def ingest(
        self,
        project_id: str,
        batch: ParsedBatch,
        deadline: Deadline,
        *,
        strict: bool = False,
        grant: Grant | None = None,
    ) -> Answer:
        """Validate a project's events and hand the valid ones over to be stored.

        Those of blocked persons are answered like the others, and neither stored nor kept. Raises
        Unavailable if they cannot be stored now, or not be read in time. If `strict`, one
        invalid event is enough to store nothing and raise InvalidEvents. With a `grant`, nothing is
        stored or kept before that is made; it is returned if they are not stored.
        """
        if grant is None:
            return self._ingest(project_id, batch, deadline, strict, None)
        try:
            answer = self._ingest(project_id, batch, deadline, strict, grant.granted)
        except InvalidEvents:
            raise
        except BaseException:
            grant.withdraw()
            raise
        grant.follow(answer.stored)
        return answer

    def _ingest(
        self,
        project_id: str,
        batch: ParsedBatch,
        deadline: Deadline,
        strict: bool,
        granted: "Future[None] | None",
    ) -> Answer:
        rows: list[Row] = []
        problems: list[Problem] = []
        errors: list[EventError] = []
        for index, event in enumerate(_read_in_time(batch, deadline)):
            if isinstance(event, Row):
                rows.append(event)
                continue
            try:
                rows.append(self._check(event, project_id))
            except InvalidEvent as invalid:
                problems.append(invalid.problem)
                errors.append(EventError(index=index, error=str(invalid)))
        if errors and strict:
            raise InvalidEvents([(each.index, each.error) for each in errors], batch.count)
        response = IngestEventsResponse(accepted=len(rows), rejected=len(errors), errors=errors)
        hand_over = partial(self._hand_over, project_id, batch, rows, errors, deadline)
        stored = hand_over() if granted is None else _call_after(granted, hand_over)
        return Answer(response, problems, stored)

    def _hand_over(
        self,
        project_id: str,
        batch: ParsedBatch,
        rows: list[Row],
        errors: list[EventError],
        deadline: Deadline,
    ) -> "Future[None]":
        if (blocked := self._find_blocked(project_id)) is not None:
            rows = self._drop_blocked(rows, blocked)
            errors = _drop_unkept(batch, errors, blocked)
        stored = self._store(rows, deadline)
        if errors and self._on_rejected is not None:
            self._on_rejected(project_id, batch, errors)
        return stored

    def _check(self, parsed: ParsedEvent | MalformedEvent, project_id: str) -> Row:
        if isinstance(parsed, MalformedEvent):
            raise InvalidEvent(self._validator.explain_malformed(parsed, project_id))
        self._validator.check_event(parsed, project_id)
        row = self._rows.encode(parsed)
        if not self._writer.needs_encoded:
            return row
        truncate_timestamp(parsed.event.event_timestamp)  # as the row does
        return row._replace(encoded=parsed.event.SerializeToString())

    def _drop_blocked(self, rows: list[Row], blocked: BlockedPersons) -> list[Row]:
        others = [row for row in rows if not blocked.own_row(row)]
        if len(others) < len(rows):
            self._on_blocked(len(rows) - len(others))
        return others

    def _store(self, rows: list[Row], deadline: Deadline) -> "Future[None]":
        if rows:
            return self._writer.submit(rows, deadline)
        nothing: Future[None] = Future()
        nothing.set_result(None)
        return nothing


def _drop_unkept(
    batch: ParsedBatch, errors: list[EventError], blocked: BlockedPersons
) -> list[EventError]:
    """Return the errors of events that may be kept."""
    return [
        error
        for error in errors
        if (event := batch.received(error.index)) is None
        or not blocked.may_own(batch.protocol, event)
    ]


def _read_in_time(batch: ParsedBatch, deadline: Deadline) -> Iterator[ReadEvent]:
    return batch.events if batch.size < _LARGE_BYTES else _read_until(deadline, batch)


def _read_until(deadline: Deadline, batch: ParsedBatch) -> Iterator[ReadEvent]:
    for event in batch.events:
        deadline.check()
        yield event


def _call_after(granted: "Future[None]", hand_over: Callable[[], "Future[None]"]) -> "Future[None]":
    """Hand events over once they are granted; return what is done when they are stored."""
    stored: Future[None] = Future()

    def settle(error: BaseException | None) -> None:
        with suppress(InvalidStateError):
            if error is None:
                stored.set_result(None)
            else:
                stored.set_exception(error)

    def go_on(done: "Future[None]") -> None:
        if (refusal := done.exception()) is not None:
            settle(refusal)
            return
        try:
            hand_over().add_done_callback(lambda last: settle(last.exception()))
        except IngestError as error:
            settle(error)
        except Exception:  # noqa: BLE001 - whatever happens, the request is answered
            _log.exception("granted events cannot be handed over")
            settle(Internal())

    granted.add_done_callback(go_on)
    return stored
