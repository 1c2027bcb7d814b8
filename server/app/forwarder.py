"""One forwarder process."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from server.app.parts import open_digests, open_tracing, opened_database
from server.app.probes import Probes
from server.config import DeletionAccess, Settings
from server.forwarding.abandoned import AbandonedLanes
from server.forwarding.deletion_lane import DeletionLane
from server.forwarding.http_client import Transport
from server.forwarding.lane import Lane
from server.forwarding.lane_health import LaneHealth
from server.forwarding.outbox_monitor import OutboxMonitor
from server.forwarding.providers.amplitude import Amplitude
from server.forwarding.providers.amplitude_deletions import AmplitudeDeletions
from server.forwarding.providers.deletions import DeletionService
from server.forwarding.providers.mixpanel import Mixpanel
from server.forwarding.providers.mixpanel_deletions import MixpanelDeletions
from server.forwarding.providers.provider import Provider
from server.forwarding.queries import Queries
from server.forwarding.round import REQUESTS_IN_FLIGHT
from server.forwarding.sender import Sender
from server.http.server import HTTPServer
from server.processes.lifeline import Lifeline
from server.processes.ports import PortTaken, listen, reserve_ports
from server.processes.priority import lower_priority
from server.storage.connection import Engine, GuardedConnection, open_engine
from server.storage.health import Readiness, Watchdog
from server.storage.migrate import check_migrated
from server.storage.outages import OutageLog
from server.telemetry.counting import Counts, Totals
from server.telemetry.metrics import FORWARDER_METRICS, PROVIDER_REQUESTS
from server.telemetry.metrics_page import (
    CountsCollector,
    MetricsPage,
    MetricsServer,
    ServiceCollector,
)
from server.telemetry.reports import Reporter, find_socket

if TYPE_CHECKING:
    from server.telemetry.tracing import Tracing

_NICENESS = 10
_PROVIDERS = {provider.name: provider for provider in (Amplitude, Mixpanel)}
_DELETIONS: dict[str, Callable[[DeletionAccess], DeletionService]] = {
    service.name: service for service in (AmplitudeDeletions, MixpanelDeletions)
}
_BEAT_SECONDS = 1.0
# An event loop that has stood still this long does not come back.
_HUNG_SECONDS = 60.0

_log = logging.getLogger("productgraph.forwarder")


def run_forwarder(settings: Settings) -> None:
    """Forward to the enabled providers until a signal, or the end of the parent if it has one."""
    lower_priority(_NICENESS)  # ingestion goes first: the outbox keeps what waits
    with opened_database(settings) as database_url, ExitStack() as stack:
        asyncio.run(_forward(settings, open_engine(database_url), stack))


async def _forward(settings: Settings, engine: Engine, stack: ExitStack) -> None:
    check_migrated(engine)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _announce(settings)
    counts, heart, watchdog = Counts(), _Heart(), Watchdog()
    _report_metrics(counts, watchdog, stack)
    stack.enter_context(watchdog)
    lifeline = Lifeline.find()
    if lifeline is None:
        _serve_metrics(settings, engine, counts, heart.is_beating, watchdog, stack)
    if tracing := open_tracing(settings):
        stack.callback(tracing.stop)
    lanes = [
        _build_lane(
            provider, settings, _open_queries(engine, watchdog, stack), tracing, counts, stop
        )
        for provider in _build_providers(settings)
    ]
    # Both have little to ask, and share a connection.
    others = _open_queries(engine, watchdog, stack)
    deletions = _build_deletion_lanes(settings, others, tracing, stop)
    abandoned = AbandonedLanes(
        others,
        tuple(settings.destinations),
        max_age=timedelta(seconds=settings.forward_max_age_seconds),
    )
    if lifeline is not None:
        lifeline.report_ready()
        lifeline.on_parent_exit(lambda: loop.call_soon_threadsafe(stop.set))
    # Without a lane it waits too: if it ended, a supervisor would start it again and again.
    runs = [*(lane.run() for lane in lanes), *(lane.run() for lane in deletions)]
    on_beat = (lambda: None) if lifeline is None else lifeline.report_beat
    await asyncio.gather(stop.wait(), heart.beat(stop, on_beat), abandoned.run(stop), *runs)


def _announce(settings: Settings) -> None:
    """Log where events are forwarded to, without credentials that the address may contain."""
    if not settings.destinations and not settings.deletions:
        _log.warning("no analytics provider is enabled, nothing is forwarded")
    for name, destination in settings.destinations.items():
        parts = urlsplit(destination.endpoint)
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        max_age = str(timedelta(seconds=settings.forward_max_age_seconds))
        extra = {"provider": name, "endpoint": place, "max_age": max_age}
        _log.info("forwarding every stored event", extra=extra)


class _Heart:
    """Tells from other threads whether the event loop runs."""

    def __init__(self) -> None:
        self._beat_at = time.monotonic()

    def is_beating(self) -> bool:
        """Return whether the loop has run lately."""
        return time.monotonic() - self._beat_at < _HUNG_SECONDS

    async def beat(self, stop: asyncio.Event, on_beat: Callable[[], object]) -> None:
        """Note every second that the loop runs, and call `on_beat`, until `stop` is set."""
        while not stop.is_set():
            self._beat_at = time.monotonic()
            on_beat()
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _BEAT_SECONDS)


def _report_metrics(counts: Counts, watchdog: Watchdog, stack: ExitStack) -> None:
    """Report the counts to the parent, if there is one that has a metrics page."""
    if (connection := find_socket()) is not None:
        reporter = Reporter(connection, counts, lambda: None)
        watchdog.watch(reporter.report)
        stack.callback(reporter.stop)


def _serve_metrics(
    settings: Settings,
    engine: Engine,
    counts: Counts,
    is_healthy: Callable[[], bool],
    watchdog: Watchdog,
    stack: ExitStack,
) -> None:
    """Serve the metrics page of a forwarder that has no parent.

    If the port is taken, perhaps by a service beside it, events are forwarded without a page.
    """
    if settings.metrics_port is None:
        return
    wanted = {"METRICS_PORT": settings.metrics_port}
    try:
        ports = stack.enter_context(reserve_ports(settings.host, wanted))
    except PortTaken as problem:
        _log.warning("no metrics and no health check: %s", problem)
        return
    readiness = Readiness(GuardedConnection(engine, outages=OutageLog()))
    monitor = OutboxMonitor(GuardedConnection(engine))
    state = ServiceCollector(readiness.is_ready, monitor.lanes, tuple(settings.destinations))
    totals = CountsCollector(Totals(FORWARDER_METRICS, counts))
    probes = Probes(MetricsPage(totals, state), readiness.is_ready)
    probes.watch(is_healthy)
    listener = listen(settings.host, ports["METRICS_PORT"])
    server = HTTPServer(probes, listener)
    watchdog.watch(readiness.check, monitor.check)
    for thread in (readiness, monitor):
        stack.enter_context(thread)
    page_server = MetricsServer(server)
    page_server.start()
    stack.callback(page_server.stop)
    _log.info("metrics", extra={"port": ports["METRICS_PORT"]})


def _open_queries(engine: Engine, watchdog: Watchdog, stack: ExitStack) -> Queries:
    """Open a connection of its caller's own, which the watchdog cuts if it hangs."""
    connection = stack.enter_context(GuardedConnection(engine))
    watchdog.watch(connection.cut_if_overdue)
    return Queries(connection)


def _build_providers(settings: Settings) -> list[Provider]:
    return [
        _PROVIDERS[name](destination.credential, destination.endpoint)
        for name, destination in settings.destinations.items()
    ]


def _build_lane(
    provider: Provider,
    settings: Settings,
    queries: Queries,
    tracing: "Tracing | None",
    counts: Counts,
    stop: asyncio.Event,
) -> Lane:
    transport = _open_transport(provider.name, REQUESTS_IN_FLIGHT, tracing)
    health = LaneHealth(provider, partial(counts.add, PROVIDER_REQUESTS, 1))
    sender = Sender(provider, transport, health, stop)
    max_age = timedelta(seconds=settings.forward_max_age_seconds)
    return Lane(sender, queries, health, max_age=max_age)


def _build_deletion_lanes(
    settings: Settings, queries: Queries, tracing: "Tracing | None", stop: asyncio.Event
) -> list[DeletionLane]:
    """Return a lane for each provider that can be asked to delete persons."""
    if (digests := open_digests(settings)) is None:
        return []
    return [
        DeletionLane(
            _DELETIONS[name](access), _open_transport(name, 1, tracing), queries, digests, stop
        )
        for name, access in settings.deletions.items()
    ]


def _open_transport(provider: str, connections: int, tracing: "Tracing | None") -> Transport:
    """Open connections of a lane's own: a provider that hangs uses up no others."""
    if tracing is None:
        return Transport(connections)
    return tracing.open_transport(provider, connections)
