"""What a worker counts, in files of its own that the parent adds up; see metrics_page.py.

A number that changes takes prometheus-client microseconds to write. Requests are therefore only
noted when they end, and written twenty times a second, those of that time together.
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections import deque
from collections.abc import Collection, Iterable, Sequence

from prometheus_client import Counter, Gauge, Histogram

from server.events.validation import classify_problem
from server.ingest.key_cache import LOOKUP_RESULTS
from server.ingest.request_record import RequestRecord
from server.storage.connection import ERROR_KINDS

PREFIX = "productgraph"
# The field of a problem whose text does not begin with one.
OTHER_FIELD = "other"

_SUCCESS_OF = {"http": 202, "grpc": "OK"}
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_EVENTS = (0, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)
_GROUP_ROWS = (1, 5, 25, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000)
_GROUP_BYTES = tuple(4**power for power in range(5, 13))  # 1 KiB to 16 MiB


class _Histogram(Histogram):
    """A histogram that takes many values for little more than the cost of one."""

    def observe_all(self, amounts: Collection[float]) -> None:
        """The same as `observe` with each of them."""
        bounds = self._upper_bounds
        for index, count in Tally(bisect_left(bounds, amount) for amount in amounts).items():
            self._buckets[index].inc(count)
        self._sum.inc(sum(amounts))


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, namespace=PREFIX, registry=None)


def _gauge(name: str, text: str) -> Gauge:
    return Gauge(name, text, namespace=PREFIX, registry=None, multiprocess_mode="livesum")


def _histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> _Histogram:
    return _Histogram(name, text, labels, namespace=PREFIX, registry=None, buckets=buckets)


class RequestMetrics:
    """Counts requests and their events: a sink; `flush` writes what it was given.

    `fields` are the names of fields that a problem may be of, if not of the event as a whole.
    """

    def __init__(self, fields: Iterable[str]) -> None:
        self._fields = frozenset(("event", *fields))
        self._finished: deque[RequestRecord] = deque()
        self._requests = _counter(
            "requests", "Requests answered, by HTTP status or gRPC code.", "protocol", "status"
        )
        self._rejected = _counter(
            "events_rejected", "Events that validation rejected.", "field", "reason"
        )
        accepted = _counter(
            "events_accepted",
            "Events accepted and stored, those that had been stored before included.",
            "protocol",
        )
        events = _histogram("request_events", "Events in a request.", _EVENTS, "protocol")
        durations = [
            _histogram(name, text, _SECONDS, "protocol")
            for name, text in (
                ("request_seconds", "Time from a request's start to its answer."),
                ("request_decode_seconds", "Time to read, decode and validate a request."),
                ("request_store_seconds", "Time a request waited for its commit."),
            )
        ]
        # Bound once, so that all are on the page from the start.
        self._accepted = {protocol: accepted.labels(protocol) for protocol in _SUCCESS_OF}
        self._events = {protocol: events.labels(protocol) for protocol in _SUCCESS_OF}
        self._durations = {
            protocol: [duration.labels(protocol) for duration in durations]
            for protocol in _SUCCESS_OF
        }
        for protocol, status in _SUCCESS_OF.items():
            self._requests.labels(protocol, status)

    def record(self, request: RequestRecord) -> None:
        """Takes note of a finished request; from any thread."""
        self._finished.append(request)

    def flush(self) -> None:
        """Counts what was recorded since the last time; in one thread at a time."""
        finished = [self._finished.popleft() for _ in range(len(self._finished))]
        for protocol in {request.protocol for request in finished}:
            self._count(protocol, [each for each in finished if each.protocol == protocol])

    def _count(self, protocol: str, finished: Sequence[RequestRecord]) -> None:
        for status, count in Tally(each.status for each in finished).items():
            self._requests.labels(protocol, status).inc(count)
        total, decoding, storing = self._durations[protocol]
        total.observe_all([each.seconds for each in finished])
        decoding.observe_all(_present(each.seconds_decoding for each in finished))
        storing.observe_all(_present(each.seconds_storing for each in finished))
        success = _SUCCESS_OF[protocol]
        responses = [each.response for each in finished if each.status == success]
        answers = [response for response in responses if response is not None]
        self._accepted[protocol].inc(sum(answer.accepted for answer in answers))
        self._events[protocol].observe_all([each.accepted + each.rejected for each in answers])
        problems = Tally(error.error for answer in answers for error in answer.errors)
        for problem, count in problems.items():
            field, reason = classify_problem(problem)
            self._rejected.labels(field if field in self._fields else OTHER_FIELD, reason).inc(
                count
            )


def _present(amounts: Iterable[float | None]) -> list[float]:
    return [amount for amount in amounts if amount is not None]


class StorageMetrics:
    """Counts what a worker does with its database; the methods are callbacks of its parts."""

    def __init__(self) -> None:
        self._duplicates = _counter(
            "events_duplicate", "Accepted events that had been stored before."
        )
        self._group_rows = _histogram("writer_group_rows", "Events in a commit.", _GROUP_ROWS)
        self._group_bytes = _histogram(
            "writer_group_bytes", "Bytes of COPY in a commit.", _GROUP_BYTES
        )
        self._waiting = _gauge("writer_waiting_batches", "Requests that wait for their commit.")
        self._waiting_bytes = _gauge(
            "writer_waiting_bytes", "Bytes of COPY that wait for their commit."
        )
        self._cached = _gauge("api_keys_cached", "API keys in the memories of all workers.")
        self._dropped = _counter(
            "rejected_events_dropped", "Rejected events that were too many to be kept."
        )
        errors = _counter(
            "database_errors", "Transactions that failed, probes of an outage included.", "kind"
        )
        lookups = _counter("api_key_lookups", "API keys that the database was asked for.", "result")
        self._errors = {kind: errors.labels(kind) for kind in ERROR_KINDS}
        self._lookups = {result: lookups.labels(result) for result in LOOKUP_RESULTS}
        _gauge("workers", "Workers that live.").set(1)

    def count_group(self, rows: int, size: int) -> None:
        """A group of so many rows and bytes was committed."""
        self._group_rows.observe(rows)
        self._group_bytes.observe(size)

    def count_duplicates(self, count: int) -> None:
        """So many of the committed rows were not new."""
        self._duplicates.inc(count)

    def count_error(self, kind: str) -> None:
        """A transaction failed."""
        self._errors[kind].inc()

    def count_lookups(self, result: str, count: int) -> None:
        """So many keys were looked up, with this result."""
        self._lookups[result].inc(count)

    def count_dropped(self, count: int) -> None:
        """So many rejected events were not kept."""
        self._dropped.inc(count)

    def show(self, backlog: tuple[int, int], known_keys: int) -> None:
        """How many batches and bytes wait to be stored, and how many keys are known."""
        batches, size = backlog
        self._waiting.set(batches)
        self._waiting_bytes.set(size)
        self._cached.set(known_keys)
