"""Rejected events taken once more, as if they came now."""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby

from server.deadline import Deadline
from server.errors import IngestError, InvalidArgument, Unavailable
from server.events.batch import ParsedBatch
from server.events.encoded_events_pb2 import EncodedEvents
from server.events.json_codec import JsonCodec
from server.events.json_parser import MAX_VALUES
from server.events.protobuf_codec import ProtobufCodec
from server.ingest.ingestion import Ingestion
from server.protocols import HTTP
from server.storage.connection import Connection
from server.storage.errors import DatabaseError
from server.storage.rejected_events import StoredRejection, read_pages, settle_replayed

# Well within what a request may hold.
_BATCH_BYTES, _BATCH_VALUES = 2 << 20, MAX_VALUES // 2
_CUT = "event: kept in part, and cannot be replayed"


@dataclass
class Replayed:
    """What became of rejected events, by their ids; the rejected with the reasons of now."""

    accepted: list[int] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)


class Replay:
    """Takes rejected events in once more, as if their clients had sent them again."""

    def __init__(
        self,
        ingestion: Ingestion,
        json: JsonCodec,
        protobuf: ProtobufCodec,
        *,
        timeout_seconds: float,
    ) -> None:
        self._ingestion = ingestion
        self._json = json
        self._protobuf = protobuf
        self._timeout_seconds = timeout_seconds

    def run(
        self, connection: Connection, project_id: str | None, ids: Sequence[int], result: Replayed
    ) -> None:
        """Replays those of a project and with these ids; None and an empty `ids` mean all.

        What is accepted is stored when its row is deleted. What cannot be replayed keeps nothing
        else from it. Raises DatabaseError, with what was done until then in `result`.
        """
        for page in read_pages(connection, project_id, ids):
            for _, group in groupby(sorted(page, key=_source), key=_source):
                for rejections in _cut_into_batches(group):
                    outcome = Replayed()
                    self._take(rejections, outcome)
                    settle_replayed(connection, outcome.accepted, outcome.rejected)
                    result.accepted += outcome.accepted
                    result.rejected |= outcome.rejected

    def _take(self, rejections: Sequence[StoredRejection], outcome: Replayed) -> None:
        """Replay those of one project and one protocol, which one request may hold."""
        whole = [rejection for rejection in rejections if not rejection.is_cut]
        outcome.rejected |= {r.id: _CUT for r in rejections if r.is_cut}
        if not whole:
            return
        try:
            self._ingest(whole, outcome)
        except InvalidArgument as error:
            if len(whole) == 1:
                outcome.rejected[whole[0].id] = str(error)
                return
            for half in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
                self._take(half, outcome)

    def _ingest(self, whole: Sequence[StoredRejection], outcome: Replayed) -> None:
        deadline = Deadline(time.monotonic() + self._timeout_seconds)
        try:
            project_id, protocol = _source(whole[0])
            batch = self._parse(whole, protocol)
            response, _, stored = self._ingestion.ingest(project_id, batch, deadline)
            _wait(stored, deadline)
        except InvalidArgument:
            raise
        except IngestError as error:
            raise DatabaseError(str(error)) from error
        reasons = {whole[error.index].id: error.error for error in response.errors}
        outcome.rejected |= reasons
        outcome.accepted += [r.id for r in whole if r.id not in reasons]

    def _parse(self, rejections: Sequence[StoredRejection], protocol: str) -> ParsedBatch:
        events = [rejection.event for rejection in rejections]
        if protocol == HTTP:
            return self._json.parse_batch(b'{"events":[' + b",".join(events) + b"]}")
        return self._protobuf.parse_batch(EncodedEvents(events=events).SerializeToString())


def _cut_into_batches(group: Iterable[StoredRejection]) -> Iterator[list[StoredRejection]]:
    """Cut rows into what one request may hold together."""
    batch: list[StoredRejection] = []
    size = values = 0
    for rejection in group:
        # Of a JSON event's values, that is more than there can be.
        own = sum(map(rejection.event.count, (b",", b"[", b"{")))
        size, values = size + len(rejection.event), values + own
        if batch and (size > _BATCH_BYTES or values > _BATCH_VALUES):
            yield batch
            batch, size, values = [], len(rejection.event), own
        batch.append(rejection)
    yield batch


def _wait(stored: "Future[None]", deadline: Deadline) -> None:
    try:
        stored.result(max(0.0, deadline.left()))
    except TimeoutError:
        raise Unavailable("not answered in time") from None


def _source(rejection: StoredRejection) -> tuple[str, str]:
    return rejection.project_id, rejection.protocol
