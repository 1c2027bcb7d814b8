"""The only place where the parts are put together: the parent process and the workers."""

import asyncio
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from server.buckets import BucketTable
from server.certificates import CertificateSource, read_certificates
from server.config import Settings
from server.database import Engine, Link, Readiness, Watchdog, connected, open_engine, transactional
from server.embedded import EmbeddedPostgres, EmbeddedPostgresError
from server.forwarder import REQUESTS_IN_FLIGHT, Lane
from server.grpc_api import GrpcServer, IngestServicer
from server.http_api import MAX_BODY_BYTES, create_app
from server.http_server import HTTPServer
from server.json_codec import JsonCodec
from server.key_directory import KeyDirectory
from server.keys import create_key, list_keys
from server.metrics import RequestMetrics, StorageMetrics
from server.metrics_page import MetricsPage, MetricsServer, opened_directory
from server.migration import check_migrated, migrate
from server.monitor import OutboxMonitor
from server.observation import Observer, Sink
from server.openapi import encode_description
from server.outbox import Outbox
from server.partitions import PartitionKeeper
from server.protobuf_codec import ProtobufCodec
from server.providers import CURRENT_MAPPING_VERSION, Provider
from server.providers.amplitude import Amplitude
from server.providers.mixpanel import Mixpanel
from server.rate_limiter import RateLimiter
from server.recorder import RejectionRecorder
from server.replay import Replay
from server.request_log import RequestLog
from server.rows import RowEncoder
from server.schema import EVENT_SCHEMA
from server.service import IngestService
from server.storage import EventStore, OnStored
from server.transport import Transport
from server.workers import Lifeline, Supervisor, listen, reserve_ports
from server.writer import Writer

if TYPE_CHECKING:
    from server.tracing import Tracing

DEMO_PROJECT = "proj_demo"
# It decodes and validates large requests, and waits for nothing. One at a time: decoded, a body can
# take thirty times its size, and what does not fit into the processor's cache is slow.
_HTTP_THREADS = 1
# A worker drains within the first of these, and is killed after the second: 30 s in all.
_DRAIN_SECONDS, _KILL_SECONDS = 20.0, 27.0

# The variable by which a worker learns the file descriptor of the buckets that all of them share.
_BUCKETS = "PRODUCTGRAPH_BUCKETS"

_log = logging.getLogger("productgraph")


@contextmanager
def opened_database(settings: Settings, *, create: bool = False) -> Iterator[str]:
    """The URL of the database to use; the embedded one runs for as long as the context lasts.

    Without `create`, an embedded one must be there already. Raises EmbeddedPostgresError.
    """
    if settings.database_url is not None:
        yield settings.database_url
    else:
        with EmbeddedPostgres(settings.data_dir, create=create) as embedded:
            yield embedded.url


class Worker:
    """One worker process: both protocols, and what they share."""

    def __init__(self, settings: Settings, database_url: str) -> None:
        engine = open_engine(database_url)
        self._storage_metrics = metrics = StorageMetrics()
        self._request_metrics = RequestMetrics(field.wire_name for field in EVENT_SCHEMA.fields)
        self._readiness = Readiness(Link(engine))
        self._keys = KeyDirectory(
            Link(engine, on_error=metrics.count_error), on_lookups=metrics.count_lookups
        )
        self._writer = Writer(
            Link(engine, on_error=metrics.count_error),
            EventStore(
                RowEncoder(EVENT_SCHEMA).columns,
                _open_outbox(settings),
                on_duplicates=metrics.count_duplicates,
            ),
            max_waiting_bytes=settings.max_waiting_bytes,
            on_group=metrics.count_group,
        )
        self._recorders = _open_recorders(settings, engine, metrics.count_dropped)
        self._watchdog = Watchdog(
            self._writer.check,
            self._keys.check,
            self._readiness.check,
            *(recorder.check for recorder in self._recorders),
            self._write_metrics,
        )
        service = IngestService(
            EVENT_SCHEMA,
            self._keys,
            self._writer,
            timeout_seconds=settings.request_timeout_seconds,
            keep_encoded=bool(settings.destinations),
            on_rejected=next((recorder.record for recorder in self._recorders), None),
            limiter=_build_limiter(settings),
        )
        self._tracing = _open_tracing(settings)
        sinks: list[Sink] = [RequestLog()]
        if settings.metrics_port is not None:
            sinks.append(self._request_metrics)
        if self._tracing is not None:
            sinks.append(self._tracing.requests)
        observer = Observer(tuple(sinks))
        self._http = self._build_http(service, settings, observer)
        self._grpc = self._build_grpc(service, settings, observer)

    def _build_http(
        self, service: IngestService, settings: Settings, observer: Observer
    ) -> HTTPServer:
        app = create_app(
            service,
            JsonCodec(EVENT_SCHEMA),
            self._readiness.is_ready,
            description=encode_description(EVENT_SCHEMA, MAX_BODY_BYTES),
            allowed_origins=settings.cors_allowed_origins,
            observer=observer,
        )
        listener = listen(settings.host, settings.port)
        # What is a little too large is refused by the application, in its words; a body far over
        # the limit is not even read.
        return HTTPServer(app, listener, threads=_HTTP_THREADS, max_body_bytes=2 * MAX_BODY_BYTES)

    def _build_grpc(
        self, service: IngestService, settings: Settings, observer: Observer
    ) -> GrpcServer:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return GrpcServer(
            IngestServicer(service, ProtobufCodec(EVENT_SCHEMA), observer),
            self._readiness.is_ready,
            address=f"{host}:{settings.grpc_port}",
            offer_reflection=settings.grpc_reflection,
            certificates=CertificateSource(settings.grpc_tls) if settings.grpc_tls else None,
        )

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serves until `stop`, then answers what has been accepted."""
        for recorder in self._recorders:
            recorder.start()
        for part in (self._watchdog, self._writer, self._keys, self._readiness, self._grpc):
            part.start()
        on_ready()
        self._http.serve()
        self._drain()

    def stop(self) -> None:
        """Makes `run` return; from any thread or a signal handler."""
        self._http.stop()

    def _write_metrics(self) -> None:
        self._request_metrics.flush()
        self._storage_metrics.show(self._writer.backlog(), self._keys.known_count())

    def _drain(self) -> None:
        self._readiness.stop()
        grpc_drain = threading.Thread(target=self._grpc.stop, args=(_DRAIN_SECONDS,))
        grpc_drain.start()
        self._http.drain(_DRAIN_SECONDS)
        grpc_drain.join()
        self._writer.stop()
        for recorder in self._recorders:
            recorder.stop()
        self._keys.stop()
        self._watchdog.stop()
        self._write_metrics()
        if self._tracing is not None:
            self._tracing.stop()


def _open_outbox(settings: Settings) -> OnStored | None:
    if not settings.destinations:
        return None
    return Outbox(tuple(settings.destinations), CURRENT_MAPPING_VERSION).enqueue


def _open_tracing(settings: Settings) -> "Tracing | None":
    """Where it is off, nothing of OpenTelemetry is imported."""
    if not settings.tracing:
        return None
    try:
        from server.tracing import Tracing
    except ImportError as error:
        # What sets the variables is often set up for a whole cluster: no reason not to serve.
        _log.warning(
            "no traces, for the extra otel is missing: pip install 'productgraph-ingestion[otel]'",
            extra={"missing": error.name},
        )
        return None
    return Tracing()


def _open_recorders(
    settings: Settings, engine: Engine, on_dropped: Callable[[int], None]
) -> list[RejectionRecorder]:
    """One, or none where rejected events are not to be kept."""
    keep = settings.rejected_keep
    if keep is None:
        return []
    return [RejectionRecorder(Link(transactional(engine)), keep, on_dropped=on_dropped)]


def _build_limiter(settings: Settings) -> RateLimiter:
    """One for every worker: a key can have rates of its own where there is no default."""
    return RateLimiter(
        BucketTable(int(os.environ[_BUCKETS])),
        event_rate=settings.event_rate_limit,
        byte_rate=settings.byte_rate_limit,
    )


@contextmanager
def opened_replay(settings: Settings, engine: Engine) -> Iterator[Replay]:
    """What stores rejected events after all, by the same parts as a worker's."""
    writer = Writer(
        Link(engine),
        EventStore(RowEncoder(EVENT_SCHEMA).columns, _open_outbox(settings)),
        max_waiting_bytes=settings.max_waiting_bytes,
    )
    service = IngestService(
        EVENT_SCHEMA,
        KeyDirectory(Link(engine)),  # not started: an event's project is known here
        writer,
        timeout_seconds=settings.request_timeout_seconds,
        keep_encoded=bool(settings.destinations),
    )
    watchdog = Watchdog(writer.check)
    for part in (watchdog, writer):
        part.start()
    try:
        yield Replay(service, JsonCodec(EVENT_SCHEMA), ProtobufCodec(EVENT_SCHEMA))
    finally:
        writer.stop()
        watchdog.stop()


def run_worker(settings: Settings) -> None:
    """Runs one worker, started by `run_service`, until it is told to stop or that is gone."""
    lifeline = Lifeline.from_environment()
    _raise_file_limit()
    with opened_database(settings) as database_url:
        worker = Worker(settings, database_url)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stop())
        lifeline.on_parent_exit(worker.stop)
        worker.run(lifeline.report_ready)


def _raise_file_limit() -> None:
    """Each connection takes a file descriptor, and the usual limit is about a thousand."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_service(settings: Settings, announce: Callable[[dict[str, int], str | None], None]) -> None:
    """Runs the parent process until a signal: database, partitions, workers.

    `announce` is called once all workers serve, with the ports by their settings' names and, if
    there was no API key in an embedded database, a new one.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if settings.grpc_tls:
        read_certificates(settings.grpc_tls)  # unusable ones end the start here, not each worker
    with ExitStack() as stack:
        wanted = {"PORT": settings.port, "GRPC_PORT": settings.grpc_port}
        if settings.metrics_port is not None:
            wanted["METRICS_PORT"] = settings.metrics_port
        ports = stack.enter_context(reserve_ports(settings.host, wanted))
        engine, tick, first_key = _prepare_database(settings, stack)
        _keep_partitions(engine, stack)
        page = _serve_metrics(settings, ports, engine, stack)
        buckets = BucketTable().descriptor
        numbers = {name: str(number) for name, number in (ports | {_BUCKETS: buckets}).items()}
        # gRPC's own lines would be no JSON, and anybody could add some by a failed handshake.
        environment = {"GRPC_VERBOSITY": "NONE"} | os.environ | numbers
        supervisor = _supervise("worker", settings.workers, environment, page, [buckets])
        if not sys.stderr.isatty():  # where it is, SIGHUP means that the terminal is gone
            signal.signal(signal.SIGHUP, lambda *_: supervisor.restart())
        supervisors = [supervisor]
        supervisor.start()
        stack.callback(_stop_together, supervisors)
        if settings.destinations and settings.forwarders:
            supervisors.append(_keep_forwarding(settings.forwarders, page, stack))
        announce(ports, first_key)
        supervisor.run(tick, stop)


def _supervise(
    command: str,
    count: int,
    environment: Mapping[str, str],
    page: MetricsPage | None,
    descriptors: Sequence[int] = (),
) -> Supervisor:
    return Supervisor(
        [sys.executable, "-m", "server", command],
        count,
        environment=environment if page is None else {**environment, **page.environment},
        descriptors=descriptors,
        drain_seconds=_KILL_SECONDS,
        on_exit=None if page is None else partial(page.note_exit, command),
    )


def _serve_metrics(
    settings: Settings, ports: Mapping[str, int], engine: Engine, stack: ExitStack
) -> MetricsPage | None:
    """The page, or None where it is not wanted."""
    if settings.metrics_port is None:
        return None
    readiness, monitor = Readiness(Link(engine)), OutboxMonitor(Link(engine))
    page = MetricsPage(
        stack.enter_context(opened_directory()),
        readiness.is_ready,
        monitor.lanes,
        providers=tuple(settings.destinations),
    )
    server = MetricsServer(page, listen(settings.host, ports["METRICS_PORT"]))
    watchdog = Watchdog(readiness.check, monitor.check)
    for part in (watchdog, readiness, monitor, server):
        part.start()
        stack.callback(part.stop)
    return page


def _stop_together(supervisors: Sequence[Supervisor]) -> None:
    stopping = [threading.Thread(target=supervisor.stop) for supervisor in supervisors]
    for thread in stopping:
        thread.start()
    for thread in stopping:
        thread.join()


def _keep_forwarding(count: int, page: MetricsPage | None, stack: ExitStack) -> Supervisor:
    """Runs forwarders beside the workers: processes of their own, that slow none of them."""
    supervisor, stop = _supervise("forward", count, os.environ, page), threading.Event()
    supervisor.start()
    watching = threading.Thread(target=supervisor.run, args=(lambda: None, stop), daemon=True)
    watching.start()
    stack.callback(watching.join)
    stack.callback(stop.set)
    return supervisor


def _prepare_database(
    settings: Settings, stack: ExitStack
) -> tuple[Engine, Callable[[], None], str | None]:
    """The engine, what keeps the database running, and the first key if one was made."""
    if settings.database_url is not None:
        engine = open_engine(settings.database_url)
        check_migrated(engine)
        return engine, lambda: None, None
    embedded = stack.enter_context(EmbeddedPostgres(settings.data_dir, create=True))
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


def _keep_partitions(engine: Engine, stack: ExitStack) -> None:
    keeper = PartitionKeeper(Link(engine))
    watchdog = Watchdog(keeper.check)
    for part in (watchdog, keeper):
        part.start()
        stack.callback(part.stop)


def run_forwarder(settings: Settings) -> None:
    """Forwards to the enabled providers until a signal, or the end of the parent if it has one."""
    os.nice(10)  # ingestion goes first: what waits here is kept
    with opened_database(settings) as database_url:
        asyncio.run(_forward(settings, open_engine(database_url)))


async def _forward(settings: Settings, engine: Engine) -> None:
    check_migrated(engine)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tracing = _open_tracing(settings)
    lanes = [
        _build_lane(provider, settings, engine, tracing) for provider in _build_providers(settings)
    ]
    watchdog = Watchdog(*(lane.check for lane in lanes))
    watchdog.start()
    if lifeline := Lifeline.find():
        lifeline.report_ready()
        lifeline.on_parent_exit(lambda: loop.call_soon_threadsafe(stop.set))
    if not lanes:
        _log.warning("no analytics provider is enabled, nothing is forwarded")
    # It waits all the same: one that ended would be started again and again by what deploys it.
    await asyncio.gather(stop.wait(), *(lane.run(stop) for lane in lanes))
    watchdog.stop()
    if tracing is not None:
        tracing.stop()


def _build_providers(settings: Settings) -> list[Provider]:
    types: dict[str, type[Amplitude | Mixpanel]] = {"amplitude": Amplitude, "mixpanel": Mixpanel}
    return [
        types[name](destination.credential, destination.endpoint)
        for name, destination in settings.destinations.items()
    ]


def _build_lane(
    provider: Provider, settings: Settings, engine: Engine, tracing: "Tracing | None"
) -> Lane:
    # Connections of its own: a provider that hangs takes none of another one's.
    transport = (
        Transport(REQUESTS_IN_FLIGHT)
        if tracing is None
        else tracing.open_transport(provider.name, REQUESTS_IN_FLIGHT)
    )
    link = Link(transactional(engine))
    return Lane(
        provider, transport, link, max_age=timedelta(seconds=settings.forward_max_age_seconds)
    )
