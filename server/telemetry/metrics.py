"""The metrics, and what counts them in a process: requests, storage."""

from collections import Counter as Tally
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from server.config import AMPLITUDE, MIXPANEL
from server.forwarding.lane_health import OUTCOMES
from server.ingest.key_cache import LOOKUP_RESULTS
from server.ingest.request_record import RequestRecord
from server.storage.errors import ERROR_KINDS
from server.telemetry.counting import PROJECT, Counts, Kind, Metric

_SUCCESS_OF = {"http": 202, "grpc": "OK"}
_LIMITED = (429, "RESOURCE_EXHAUSTED")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_EVENTS = (0, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)
_GROUP_ROWS = (1, 5, 25, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000)
_GROUP_BYTES = tuple(4**power for power in range(5, 13))  # 1 KiB to 16 MiB
_PROTOCOLS = tuple((protocol,) for protocol in _SUCCESS_OF)
# What the parent runs.
_COMMANDS = ("worker", "forward")

_ALONE = ((),)


def _by_protocol(name: str, text: str, bounds: Sequence[float]) -> Metric:
    return Metric(Kind.HISTOGRAM, name, text, ("protocol",), tuple(bounds), _PROTOCOLS)


REQUESTS = Metric(
    Kind.COUNTER,
    "requests",
    "Requests answered, by HTTP status or gRPC code.",
    ("protocol", "status"),
    known=tuple((protocol, str(status)) for protocol, status in _SUCCESS_OF.items()),
)
REJECTED = Metric(
    Kind.COUNTER, "events_rejected", "Events that validation rejected.", ("field", "reason")
)
ACCEPTED = Metric(
    Kind.COUNTER,
    "events_accepted",
    "Events accepted: stored now or before, or dropped because their persons are blocked.",
    ("protocol",),
    known=_PROTOCOLS,
)
EVENTS = _by_protocol("request_events", "Events in a request.", _EVENTS)
SECONDS = _by_protocol("request_seconds", "Time from a request's start to its answer.", _SECONDS)
SECONDS_DECODING = _by_protocol(
    "request_decode_seconds", "Time to read, decode and validate a request.", _SECONDS
)
SECONDS_STORING = _by_protocol(
    "request_store_seconds", "Time a request waited for its commit.", _SECONDS
)
DUPLICATES = Metric(
    Kind.COUNTER,
    "events_duplicate",
    "Accepted events that had been stored before.",
    known=_ALONE,
)
BLOCKED = Metric(
    Kind.COUNTER,
    "events_blocked",
    "Accepted events that were dropped, because their persons are blocked.",
    known=_ALONE,
)
GROUP_ROWS = Metric(
    Kind.HISTOGRAM, "writer_group_rows", "Events in a commit.", (), _GROUP_ROWS, _ALONE
)
GROUP_BYTES = Metric(
    Kind.HISTOGRAM, "writer_group_bytes", "Bytes of COPY in a commit.", (), _GROUP_BYTES, _ALONE
)
WAITING = Metric(
    Kind.GAUGE, "writer_waiting_batches", "Requests waiting for their commit.", known=_ALONE
)
WAITING_BYTES = Metric(
    Kind.GAUGE, "writer_waiting_bytes", "Bytes of COPY waiting for their commit.", known=_ALONE
)
CACHED = Metric(
    Kind.GAUGE, "api_keys_cached", "API keys in the memories of all workers.", known=_ALONE
)
DROPPED = Metric(
    Kind.COUNTER,
    "rejected_events_dropped",
    "Rejected events that were not kept, because there were too many.",
    known=_ALONE,
)
ERRORS = Metric(
    Kind.COUNTER,
    "database_errors",
    "Transactions that failed, including probes during an outage.",
    ("kind",),
    known=tuple((kind,) for kind in ERROR_KINDS),
)
LOOKUPS = Metric(
    Kind.COUNTER,
    "api_key_lookups",
    "API keys looked up in the database.",
    ("result",),
    known=tuple((result,) for result in LOOKUP_RESULTS),
)
EVICTIONS = Metric(
    Kind.COUNTER,
    "http_connections_evicted",
    "Connections closed to make room for others, because none was left.",
    known=_ALONE,
)
WAITING_LIMIT = Metric(
    Kind.GAUGE,
    "writer_waiting_limit_bytes",
    "Bytes of COPY that may wait before requests are refused, of all workers.",
    known=_ALONE,
)
WORKERS = Metric(Kind.GAUGE, "workers", "Workers that are running.", known=_ALONE)
RESTARTS = Metric(
    Kind.COUNTER,
    "worker_restarts",
    "Processes that died and were replaced.",
    ("command",),
    known=tuple((command,) for command in _COMMANDS),
)
PARTITION_FAILURES = Metric(
    Kind.COUNTER,
    "partition_failures",
    "Times that the partitions ahead could not be made; each is tried again within minutes.",
    known=_ALONE,
)
PROVIDER_REQUESTS = Metric(
    Kind.COUNTER,
    "provider_requests",
    "Requests sent to analytics providers, by what they came to.",
    ("provider", "outcome"),
    known=tuple(product((AMPLITUDE, MIXPANEL), OUTCOMES)),
)
PROJECT_ACCEPTED = Metric(
    Kind.COUNTER,
    "project_events_accepted",
    "Events accepted and stored, by project, including those that had been stored before.",
    (PROJECT,),
)
PROJECT_DUPLICATES = Metric(
    Kind.COUNTER,
    "project_events_duplicate",
    "Accepted events that had been stored before, by project.",
    (PROJECT,),
)
PROJECT_REJECTED = Metric(
    Kind.COUNTER,
    "project_events_rejected",
    "Events that validation rejected, by project.",
    (PROJECT, "reason"),
)
PROJECT_LIMITED = Metric(
    Kind.COUNTER,
    "project_requests_limited",
    "Requests over a rate limit, by project.",
    (PROJECT,),
)
PROJECT_BYTES = Metric(
    Kind.COUNTER,
    "project_bytes",
    "Bytes of the requests that were taken, decompressed, by project.",
    (PROJECT,),
)
# Those of a forwarder that has no parent.
FORWARDER_METRICS = (PROVIDER_REQUESTS,)
METRICS = (
    *FORWARDER_METRICS,
    *(REQUESTS, REJECTED, ACCEPTED, EVENTS, SECONDS, SECONDS_DECODING, SECONDS_STORING),
    *(
        DUPLICATES,
        BLOCKED,
        GROUP_ROWS,
        GROUP_BYTES,
        WAITING,
        WAITING_BYTES,
        CACHED,
        DROPPED,
        ERRORS,
    ),
    *(LOOKUPS, EVICTIONS, WAITING_LIMIT, WORKERS, RESTARTS, PARTITION_FAILURES),
    *(PROJECT_ACCEPTED, PROJECT_DUPLICATES, PROJECT_REJECTED, PROJECT_LIMITED, PROJECT_BYTES),
)


class RequestMetrics:
    """Counts requests and their events. A sink of their records, which `flush` counts.

    Counting many requests at once costs less, and not in the threads that serve them.
    """

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._finished: deque[RequestRecord] = deque()

    def record(self, request: RequestRecord) -> None:
        """Take note of a finished request; from any thread."""
        self._finished.append(request)

    def flush(self) -> None:
        """Count what was recorded since the last time; in one thread at a time."""
        finished = [self._finished.popleft() for _ in range(len(self._finished))]
        for protocol in {request.protocol for request in finished}:
            self._count(protocol, [each for each in finished if each.protocol == protocol])

    def _count(self, protocol: str, finished: Sequence[RequestRecord]) -> None:
        counts = self._counts
        for status, count in Tally(each.status for each in finished).items():
            counts.add(REQUESTS, count, protocol, str(status))
        counts.observe(SECONDS, [each.seconds for each in finished], protocol)
        decoding = _present(each.seconds_decoding for each in finished)
        counts.observe(SECONDS_DECODING, decoding, protocol)
        storing = _present(each.seconds_storing for each in finished)
        counts.observe(SECONDS_STORING, storing, protocol)
        success = _SUCCESS_OF[protocol]
        succeeded = [each for each in finished if each.status == success]
        answers = [each.response for each in succeeded if each.response is not None]
        counts.add(ACCEPTED, sum(answer.accepted for answer in answers), protocol)
        counts.observe(EVENTS, [each.accepted + each.rejected for each in answers], protocol)
        kinds = Tally(problem[:2] for each in succeeded for problem in each.problems)
        for (field, reason), count in kinds.items():
            counts.add(REJECTED, count, field, reason)
        self._count_projects(finished, succeeded)

    def _count_projects(
        self, finished: Sequence[RequestRecord], succeeded: Sequence[RequestRecord]
    ) -> None:
        accepted, size, rejected = Tally[str](), Tally[str](), Tally[tuple[str, str]]()
        for each in succeeded:
            if each.project_id is not None and each.response is not None:
                accepted[each.project_id] += each.response.accepted
                size[each.project_id] += each.size_bytes or 0
                for problem in each.problems:
                    rejected[each.project_id, problem.reason] += 1
        limited = Tally(each.project_id or "" for each in finished if each.status in _LIMITED)
        for metric, tally in (
            (PROJECT_ACCEPTED, accepted),
            (PROJECT_BYTES, size),
            (PROJECT_LIMITED, limited),
        ):
            for project, count in tally.items():
                self._counts.add(metric, count, project)
        for (project, reason), count in rejected.items():
            self._counts.add(PROJECT_REJECTED, count, project, reason)


def _present(amounts: Iterable[float | None]) -> list[float]:
    return [amount for amount in amounts if amount is not None]


class StorageMetrics:
    """Counts what a worker does with its database; the methods are callbacks of its parts."""

    def __init__(self, counts: Counts, max_waiting_bytes: int) -> None:
        self._counts = counts
        counts.set(WORKERS, 1)
        counts.set(WAITING_LIMIT, max_waiting_bytes)

    def count_group(self, rows: int, size: int) -> None:
        """Count a committed group of `rows` rows and `size` bytes."""
        self._counts.observe(GROUP_ROWS, (rows,))
        self._counts.observe(GROUP_BYTES, (size,))

    def count_duplicates(self, duplicates: Mapping[str, int]) -> None:
        """Count committed rows that were not new, by their projects."""
        self._counts.add(DUPLICATES, sum(duplicates.values()))
        for project, count in duplicates.items():
            self._counts.add(PROJECT_DUPLICATES, count, project)

    def count_blocked(self, count: int) -> None:
        """Count accepted events that were dropped."""
        self._counts.add(BLOCKED, count)

    def count_error(self, kind: str) -> None:
        """Count a failed transaction."""
        self._counts.add(ERRORS, 1, kind)

    def count_lookups(self, result: str, count: int) -> None:
        """Count keys that were looked up with this result."""
        self._counts.add(LOOKUPS, count, result)

    def count_dropped(self, count: int) -> None:
        """Count rejected events that were not kept."""
        self._counts.add(DROPPED, count)

    def count_eviction(self) -> None:
        """Count a connection that was closed to make room for another."""
        self._counts.add(EVICTIONS, 1)

    def show(self, backlog: tuple[int, int], known_keys: int) -> None:
        """Show the batches and bytes that wait to be stored, and the number of known keys."""
        batches, size = backlog
        self._counts.set(WAITING, batches)
        self._counts.set(WAITING_BYTES, size)
        self._counts.set(CACHED, known_keys)
