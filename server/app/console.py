"""The console of a service. Import it only if it is on: nothing else in the parent needs Falcon."""

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from server.app.parts import name_command
from server.config import ConsoleSettings, Settings
from server.console import (
    Access,
    Overview,
    Reader,
    ServiceState,
    Sources,
    Throughput,
    Totals,
    create_app,
)
from server.forwarding.outbox_monitor import OutboxMonitor
from server.storage.connection import Engine, GuardedConnection
from server.storage.health import Readiness, Watchdog
from server.telemetry import counting
from server.telemetry.metrics import ACCEPTED, DUPLICATES, REJECTED, WORKERS
from server.telemetry.metrics_page import read_version

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication


class Vitals(NamedTuple):
    """The state of a service, known without a query."""

    totals: counting.Totals
    readiness: Readiness
    monitor: OutboxMonitor


def open_console(
    settings: Settings,
    console: ConsoleSettings,
    engine: Engine,
    vitals: Vitals,
    watchdog: Watchdog,
    stack: ExitStack,
) -> "WSGIApplication":
    """Return the console, with a connection of its own."""
    started_at = datetime.now(UTC)
    throughput = Throughput(lambda: _read_totals(vitals.totals))
    reader = Reader(GuardedConnection(engine))
    watchdog.watch(reader.check, throughput.note)
    stack.enter_context(reader)
    overview = Overview(
        lambda: ServiceState(
            read_version(),
            started_at,
            int(vitals.totals.add_up(WORKERS)),
            vitals.readiness.is_ready(),
            settings.rejected_keep is not None,
            name_command(),
        ),
        throughput,
        vitals.monitor.lanes,
        tuple(settings.destinations),
    )
    # An event can be seen once its transaction has committed, which takes up to this long.
    delay = timedelta(seconds=settings.request_timeout_seconds + 1.0)
    access = Access(console.hosts, console.password)
    return create_app(Sources(overview, reader, delay), access)


def _read_totals(totals: counting.Totals) -> Totals:
    accepted, duplicate, rejected = (
        int(totals.add_up(metric)) for metric in (ACCEPTED, DUPLICATES, REJECTED)
    )
    return Totals(max(0, accepted - duplicate), duplicate, rejected)
