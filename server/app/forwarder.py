"""One forwarder process."""

import asyncio
import logging
import signal
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

from server.app.parts import open_tracing, opened_database
from server.config import Settings
from server.forwarding.http_client import Transport
from server.forwarding.lane import REQUESTS_IN_FLIGHT, Lane
from server.forwarding.providers.amplitude import Amplitude
from server.forwarding.providers.mixpanel import Mixpanel
from server.forwarding.providers.provider import Provider
from server.processes.lifeline import Lifeline
from server.processes.priority import lower_priority
from server.storage.connection import Engine, GuardedConnection, open_engine
from server.storage.health import Watchdog
from server.storage.migrate import check_migrated

if TYPE_CHECKING:
    from server.telemetry.tracing import Tracing

_NICENESS = 10
_PROVIDERS = {provider.name: provider for provider in (Amplitude, Mixpanel)}

_log = logging.getLogger("productgraph")


def run_forwarder(settings: Settings) -> None:
    """Forwards to the enabled providers until a signal, or the end of the parent if it has one."""
    lower_priority(_NICENESS)  # ingestion goes first: what waits here is kept
    with opened_database(settings) as database_url:
        asyncio.run(_forward(settings, open_engine(database_url)))


async def _forward(settings: Settings, engine: Engine) -> None:
    check_migrated(engine)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tracing = open_tracing(settings)
    with ExitStack() as stack:
        if tracing is not None:
            stack.callback(tracing.stop)
        lanes = []
        for provider in _build_providers(settings):
            connection = stack.enter_context(GuardedConnection(engine))
            stack.enter_context(Watchdog(connection.cut_if_overdue))
            lanes.append(_build_lane(provider, settings, connection, tracing))
        if lifeline := Lifeline.find():
            lifeline.report_ready()
            lifeline.on_parent_exit(lambda: loop.call_soon_threadsafe(stop.set))
        if not lanes:
            _log.warning("no analytics provider is enabled, nothing is forwarded")
        # It waits all the same: one that ended would be restarted again and again.
        await asyncio.gather(stop.wait(), *(lane.run(stop) for lane in lanes))


def _build_providers(settings: Settings) -> list[Provider]:
    return [
        _PROVIDERS[name](destination.credential, destination.endpoint)
        for name, destination in settings.destinations.items()
    ]


def _build_lane(
    provider: Provider,
    settings: Settings,
    connection: GuardedConnection,
    tracing: "Tracing | None",
) -> Lane:
    # Connections of its own: a provider that hangs takes none of another one's.
    transport = (
        Transport(REQUESTS_IN_FLIGHT)
        if tracing is None
        else tracing.open_transport(provider.name, REQUESTS_IN_FLIGHT)
    )
    max_age = timedelta(seconds=settings.forward_max_age_seconds)
    return Lane(provider, transport, connection, max_age=max_age)
