"""The parent process: database, ports, metrics, and the worker and forwarder processes."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from server.app.parts import BUCKETS, DEMO_PROJECT, find_data, open_digests, open_redactor
from server.app.probes import Pages, Probes
from server.config import AMPLITUDE, MIXPANEL, Settings
from server.forwarding.outbox_monitor import OutboxMonitor
from server.grpc.certificates import read_certificates
from server.http.server import HTTPServer
from server.ingest.buckets import BucketTable
from server.privacy.block_list import check_recognised
from server.processes.ports import listen, reserve_ports
from server.processes.supervisor import Program, Supervisor
from server.storage.accounts import EmbeddedPostgresError
from server.storage.connection import Engine, GuardedConnection, connected, open_engine
from server.storage.embedded import EmbeddedPostgres
from server.storage.errors import DatabaseError
from server.storage.forward_history import ProviderNotes
from server.storage.health import Readiness, Watchdog
from server.storage.keys import create_key, list_keys
from server.storage.migrate import check_migrated, migrate
from server.storage.partitions import PartitionKeeper
from server.storage.projects_monitor import ProjectsMonitor
from server.storage.rights import check_rights
from server.telemetry.counting import Counts, Totals
from server.telemetry.metrics import METRICS, PARTITION_FAILURES, RESTARTS
from server.telemetry.metrics_page import (
    CountsCollector,
    MetricsPage,
    MetricsServer,
    ServiceCollector,
)
from server.telemetry.reports import ReportReceiver

# Settings of libraries, unless the environment has its own.
_WORKER_VARIABLES = {
    # gRPC's lines would be no JSON, and anybody could add some by a failed handshake.
    "GRPC_VERBOSITY": "NONE",
    # glibc gives the memory of large requests back when they are over (mallopt(3)).
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
}
# A process is killed this long after SIGTERM; the whole service then ends within 30 s.
_KILL_SECONDS = 27.0

_log = logging.getLogger("productgraph")


class _Metrics(NamedTuple):
    receiver: ReportReceiver
    counts: Counts
    probes: Probes

    def note_exit(self, command: str, process: int, expected: bool) -> None:
        self.receiver.note_exit(process)
        if not expected:
            self.counts.add(RESTARTS, 1, command)


def run_service(settings: Settings, announce: Callable[[dict[str, int], str | None], None]) -> None:
    """Run the parent process until a signal: database, partitions, workers.

    `announce` is called once all workers serve, with the ports by their settings' names and, if
    there was no API key in an embedded database, a new one.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    has_terminal = sys.stderr.isatty()  # SIGHUP means that it is gone
    if not has_terminal:
        signal.signal(signal.SIGHUP, lambda *_: None)  # no workers to replace yet
    if settings.grpc_tls:
        read_certificates(settings.grpc_tls)  # unusable ones end the start here, not each worker
    open_redactor(settings)  # rules that cannot be followed end the start here
    with ExitStack() as stack:
        wanted = {"PORT": settings.port, "GRPC_PORT": settings.grpc_port}
        if settings.metrics_port is not None:
            wanted["METRICS_PORT"] = settings.metrics_port
        ports = stack.enter_context(reserve_ports(settings.host, wanted))
        engine, tick, first_key = _prepare_database(settings, stack)
        _warn_of_blocked(settings, engine)
        counts = Counts()
        on_failure = partial(counts.add, PARTITION_FAILURES, 1)
        keeper = PartitionKeeper(GuardedConnection(engine), on_failure=on_failure)
        # No client waits for the queries of this process: their deadlines need not be exact.
        watchdog = stack.enter_context(Watchdog(interval_seconds=0.25))
        metrics = _serve_metrics(settings, ports, engine, keeper, counts, watchdog, stack)
        _keep_tables(settings, engine, keeper, watchdog, stack)
        buckets = BucketTable().descriptor
        numbers = {name: str(number) for name, number in (ports | {BUCKETS: buckets}).items()}
        environment = _WORKER_VARIABLES | os.environ | numbers
        supervisor = _supervise("worker", settings.workers, environment, metrics, [buckets])
        if not has_terminal:
            signal.signal(signal.SIGHUP, lambda *_: supervisor.restart())
        if metrics is not None:
            metrics.probes.watch(supervisor.is_serving)
        supervisors = [supervisor]
        supervisor.start()
        stack.callback(_stop_together, supervisors)
        if settings.forwarders and (settings.destinations or settings.deletions):
            supervisors.append(_keep_forwarding(settings.forwarders, metrics, stack))
        announce(ports, first_key)
        supervisor.run(tick, stop)


def _warn_of_blocked(settings: Settings, engine: Engine) -> None:
    """Log an error if blocked persons cannot be recognised, so that their events are stored."""
    try:
        with connected(engine) as connection:
            check_recognised(connection, open_digests(settings))
    except DatabaseError as error:
        _log.error("not all blocked persons are kept out: %s", error)


def _supervise(
    command: str,
    count: int,
    environment: Mapping[str, str],
    metrics: _Metrics | None,
    descriptors: Sequence[int] = (),
) -> Supervisor:
    on_exit = None
    if metrics is not None:
        environment = {**environment, **metrics.receiver.environment}
        descriptors = (*descriptors, metrics.receiver.descriptor)
        on_exit = partial(metrics.note_exit, command)
    # -P as in this process, lest modules of the working directory come first.
    python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
    program = Program([*python, "-m", "server", command], environment, descriptors)
    return Supervisor(program, count, drain_seconds=_KILL_SECONDS, on_exit=on_exit)


def _serve_metrics(
    settings: Settings,
    ports: Mapping[str, int],
    engine: Engine,
    keeper: PartitionKeeper,
    counts: Counts,
    watchdog: Watchdog,
    stack: ExitStack,
) -> _Metrics | None:
    """Serve the metrics page, and return what it shows; None if it is off."""
    if settings.metrics_port is None:
        return None
    readiness = Readiness(GuardedConnection(engine))
    monitor = OutboxMonitor(GuardedConnection(engine))
    totals = Totals(METRICS, counts)
    receiver = ReportReceiver(totals)
    providers = tuple(settings.destinations)
    projects = ProjectsMonitor(GuardedConnection(engine))
    state = ServiceCollector(
        readiness.is_ready, monitor.lanes, providers, keeper.default_rows, projects
    )
    page = MetricsPage(CountsCollector(totals), state)
    console = None
    if settings.console is not None:
        from server.app.console import Vitals, open_console  # with Falcon, for nothing else here

        vitals = Vitals(totals, readiness, monitor)
        console = open_console(settings, settings.console, engine, vitals, watchdog, stack)
    listener = listen(settings.host, ports["METRICS_PORT"])
    probes = Probes(Pages(page, console), readiness.is_ready)
    server = HTTPServer(probes, listener)
    watchdog.watch(readiness.check, monitor.check, projects.check)
    for thread in (readiness, monitor, projects):
        stack.enter_context(thread)
    for part in (receiver, MetricsServer(server)):
        part.start()
        stack.callback(part.stop)
    return _Metrics(receiver, counts, probes)


def _stop_together(supervisors: Sequence[Supervisor]) -> None:
    stopping = [threading.Thread(target=supervisor.stop) for supervisor in supervisors]
    for thread in stopping:
        thread.start()
    for thread in stopping:
        thread.join()


def _keep_forwarding(count: int, metrics: _Metrics | None, stack: ExitStack) -> Supervisor:
    """Run forwarders beside the workers, in processes of their own that slow none of them."""
    supervisor, stop = _supervise("forward", count, os.environ, metrics), threading.Event()
    supervisor.start()
    watching = threading.Thread(target=supervisor.run, args=(lambda: None, stop), daemon=True)
    watching.start()
    stack.callback(watching.join)
    stack.callback(stop.set)
    return supervisor


def _prepare_database(
    settings: Settings, stack: ExitStack
) -> tuple[Engine, Callable[[], None], str | None]:
    """Return the engine, what keeps the database running, and the first key if one was made."""
    if settings.database_url is not None:
        engine = open_engine(settings.database_url)
        check_migrated(engine)
        check_rights(engine)
        return engine, lambda: None, None
    data = find_data(settings, create=True)
    embedded = stack.enter_context(EmbeddedPostgres(data, create=True))
    engine = open_engine(embedded.url)
    migrate(engine)
    with connected(engine) as connection:
        key = None if list_keys(connection) else create_key(connection, DEMO_PROJECT, "first key")
    return engine, lambda: _keep_running(embedded), key


def _keep_running(embedded: EmbeddedPostgres) -> None:
    try:
        if embedded.ensure_running():
            _log.warning("PostgreSQL had died, started it again")
    except EmbeddedPostgresError as error:
        _log.error("PostgreSQL cannot be started: %s", error)


def _keep_tables(
    settings: Settings,
    engine: Engine,
    keeper: PartitionKeeper,
    watchdog: Watchdog,
    stack: ExitStack,
) -> None:
    """Make partitions in time, and note which providers events are queued for."""
    enabled = set(settings.destinations)
    disabled = {AMPLITUDE, MIXPANEL} - enabled
    notes = ProviderNotes(GuardedConnection(engine), enabled, disabled)
    watchdog.watch(keeper.check, notes.check)
    stack.enter_context(keeper)
    stack.enter_context(notes)
