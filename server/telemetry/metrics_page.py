"""The page that Prometheus reads: what all processes counted, and how the service stands."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from server.storage.lanes import LaneStatus
from server.storage.quotas import Share
from server.telemetry.counting import Kind, Metric, Sums, Totals

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

PATH = "/metrics"
# How `productgraph doctor` calls itself, whose reading is none that alerts could depend on.
DOCTOR = "productgraph-doctor"
LAST_SCRAPE = "productgraph_last_scrape_timestamp_seconds"
_PREFIX = "productgraph"
_STOP_SECONDS = 2.0


class MetricsPage:
    """A WSGI application: `GET /metrics`, and nothing else."""

    def __init__(self, *collectors: Collector) -> None:
        registry = CollectorRegistry()
        self._scrapes = _Scrapes()
        for collector in (*collectors, self._scrapes):
            registry.register(collector)
        self._render = make_wsgi_app(registry)

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Answer a request."""
        if environ["PATH_INFO"] != PATH:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [f"See {PATH}.\n".encode()]
        page: Iterable[bytes] = self._render(environ, start_response)
        if environ.get("HTTP_USER_AGENT") != DOCTOR:
            self._scrapes.last_at = time.time()
        return page


class _Scrapes(Collector):
    """Puts on the page when it was read before."""

    last_at = 0.0

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """Yield the time, in seconds since 1970."""
        text = "When the page was read before, other than by `doctor`; 0 if never."
        yield GaugeMetricFamily(LAST_SCRAPE, text, self.last_at)


class CountsCollector(Collector):
    """Puts on the page what was counted."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """Yield each metric with all of its series."""
        for metric, sums in self._totals.read():
            yield _describe(metric, sums)


def _describe(metric: Metric, sums: Sums) -> prometheus_client.Metric:
    name = f"{_PREFIX}_{metric.name}"
    if metric.kind is Kind.HISTOGRAM:
        return _describe_histogram(name, metric, sums)
    family = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    described = family(name, metric.text, labels=metric.labels)
    for labels, (value,) in sums.items():
        described.add_metric(labels, value)
    return described


def _describe_histogram(name: str, metric: Metric, sums: Sums) -> HistogramMetricFamily:
    described = HistogramMetricFamily(name, metric.text, labels=metric.labels)
    bounds = [*(str(float(bound)) for bound in metric.bounds), "+Inf"]
    for labels, (*counts, total) in sums.items():
        described.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)
    return described


class Projects(Protocol):
    """Tells how many keys are about to end, and how much of the quotas is used."""

    def count_ending(self) -> int | None:
        """Return how many keys are about to end, or None if that is not known."""

    def list_shares(self) -> Sequence[Share]:
        """Return how much of the quotas is used."""


class ServiceCollector(Collector):
    """Puts on the page how the service stands: its version, its database, forwarding.

    `lanes` tells how forwarding stands, or None if that is not known; a lane of `providers` that it
    lacks has had nothing to do. `default_rows` tells how many events are in no month's partition.
    """

    def __init__(
        self,
        is_database_up: Callable[[], bool],
        lanes: Callable[[], Sequence[LaneStatus] | None],
        providers: Sequence[str],
        default_rows: Callable[[], int | None] = lambda: None,
        projects: Projects | None = None,
    ) -> None:
        self._default_rows = default_rows
        self._projects = projects
        self._idle = [LaneStatus(provider, 0, None, 0, 0, None) for provider in providers]
        self._is_database_up = is_database_up
        self._lanes = lanes

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """Yield the metrics as they are at this moment."""
        build = GaugeMetricFamily(f"{_PREFIX}_build_info", "The version.", labels=["version"])
        build.add_metric([read_version()], 1)
        yield build
        is_up = self._is_database_up()
        yield GaugeMetricFamily(
            f"{_PREFIX}_database_up", "1 if the database answers, 0 if not.", int(is_up)
        )
        if is_up and (rows := self._default_rows()) is not None:
            text = "Events in no month's partition, in events_default, by PostgreSQL's statistics."
            yield GaugeMetricFamily(f"{_PREFIX}_events_default_rows", text, rows)
        if is_up and self._projects is not None:
            yield from _describe_projects(self._projects)
        lanes = self._lanes()
        if is_up and lanes is not None:
            known = {lane.provider: lane for lane in (*self._idle, *lanes)}
            yield from _describe_lanes(known.values(), datetime.now(UTC))


def _describe_projects(projects: Projects) -> Iterator[prometheus_client.Metric]:
    """Yield what is the same on every machine that shares the database."""
    if (keys := projects.count_ending()) is not None:
        text = "API keys in use that end within 7 days, or 1 day if they have been replaced."
        yield GaugeMetricFamily(f"{_PREFIX}_api_keys_ending", text, keys)
    text = "How much of a project's quota is used: 1 is all. Of at most 200, the most used ones."
    shares = GaugeMetricFamily(f"{_PREFIX}_project_quota_used", text, labels=["project", "period"])
    for share in projects.list_shares():
        shares.add_metric([share.project_id, share.period], share.used)
    yield shares


def _describe_lanes(
    lanes: Iterable[LaneStatus], now: datetime
) -> Iterator[prometheus_client.Metric]:
    """Yield what is the same on every machine that shares the database."""
    pending, oldest, dead, stopped = (
        GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=["provider"])
        for name, text in (
            ("outbox_pending", "Events that a provider has still to get."),
            ("outbox_oldest_seconds", "Age of the oldest of them; 0 if there is none."),
            ("outbox_dead", "Events that a provider refused for good, not yet retried or purged."),
            ("lane_stopped", "1 if a provider refuses our credentials, 0 if not."),
        )
    )
    delivered = CounterMetricFamily(
        f"{_PREFIX}_events_delivered", "Events that a provider has taken.", labels=["provider"]
    )
    for lane in lanes:
        labels = [lane.provider]
        age = (now - lane.oldest_at).total_seconds() if lane.oldest_at else 0.0
        pending.add_metric(labels, lane.pending)
        oldest.add_metric(labels, max(0.0, age))
        dead.add_metric(labels, lane.dead)
        stopped.add_metric(labels, lane.stopped_reason is not None)
        delivered.add_metric(labels, lane.delivered)
    yield from (pending, oldest, dead, stopped, delivered)


class Server(Protocol):
    """Serves HTTP in the thread that calls `serve`, until `stop`."""

    def serve(self) -> None:
        """Serve until `stop` is called."""

    def stop(self) -> None:
        """Make `serve` return; from any thread."""

    def drain(self, seconds: float) -> None:
        """Answer what has been accepted."""


class MetricsServer:
    """Runs the page's server in a thread of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Start answering."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering."""
        self._server.stop()
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        self._server.serve()
        self._server.drain(0.0)


def read_version() -> str:
    """Return the version of the service."""
    try:
        return version("productgraph-ingestion")
    except PackageNotFoundError:  # run from a folder
        return "unknown"
