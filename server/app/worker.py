"""One worker process, and the replay of rejected events with the same parts."""

import gc
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from server.app.parts import (
    BUCKETS,
    load_block_list,
    open_digests,
    open_json_codec,
    open_outbox,
    open_protobuf_codec,
    open_redactor,
    open_tracing,
    opened_database,
)
from server.config import Settings
from server.events.copy_rows import RowEncoder
from server.events.json_codec import JsonCodec
from server.events.persons import RowIds
from server.events.protobuf_codec import ProtobufCodec
from server.events.schema import EVENT_SCHEMA, MAX_REQUEST_BYTES
from server.grpc.api import IngestServicer
from server.grpc.certificates import CertificateSource
from server.grpc.server import GrpcServer
from server.http.api import EVENTS_PATH, create_app
from server.http.gate import BodyGate
from server.http.openapi import encode_description
from server.http.server import HTTPServer
from server.ingest.admission import Admission
from server.ingest.buckets import BucketTable
from server.ingest.group_commit import Writer
from server.ingest.ingestion import Ingestion
from server.ingest.key_cache import KeyCache
from server.ingest.limits import RateLimiter
from server.ingest.quotas import Quotas
from server.ingest.rejection_writer import RejectionWriter
from server.ingest.replay import Replay
from server.ingest.request_record import RequestRecorder, Sink
from server.ingest.service import IngestService
from server.privacy.block_list import BlockList, find_nobody
from server.processes.lifeline import Lifeline
from server.processes.ports import listen
from server.processes.pulse import Pulse
from server.protocols import GRPC, HTTP
from server.storage.connection import Engine, GuardedConnection, connected, open_engine
from server.storage.events import EventStore
from server.storage.health import Readiness, Watchdog
from server.storage.outages import OutageLog
from server.telemetry.counting import Counts
from server.telemetry.metrics import RequestMetrics, StorageMetrics
from server.telemetry.reports import Reporter, find_socket
from server.telemetry.request_log import RejectionLog, RequestLog

# For answering what has been accepted; the parent kills a worker a few seconds later.
_DRAIN_SECONDS = 20.0


class Worker:
    """One worker process: both protocols, and what they share."""

    def __init__(self, settings: Settings, database_url: str) -> None:
        engine = open_engine(database_url)
        counts, outages = Counts(), OutageLog()
        self._storage_metrics = metrics = StorageMetrics(counts, settings.max_waiting_bytes)
        self._request_metrics = RequestMetrics(counts)
        self._readiness = Readiness(GuardedConnection(engine, outages=outages))
        self._keys = KeyCache(
            GuardedConnection(engine, on_error=metrics.count_error, outages=outages),
            on_lookups=metrics.count_lookups,
        )
        self._writer = Writer(
            GuardedConnection(engine, on_error=metrics.count_error, outages=outages),
            EventStore(
                RowEncoder(EVENT_SCHEMA).columns,
                open_outbox(settings),
                on_duplicates=metrics.count_duplicates,
            ),
            max_waiting_bytes=settings.max_waiting_bytes,
            on_group=metrics.count_group,
        )
        self._quotas = Quotas(
            GuardedConnection(engine, on_error=metrics.count_error, outages=outages)
        )
        self._rejections = _open_rejection_writers(settings, engine, metrics.count_dropped)
        self._blocked = _open_block_lists(settings, engine)
        self._checks = (
            self._writer.check,
            self._keys.check,
            self._quotas.check,
            self._readiness.check,
            *(writer.check for writer in self._rejections),
            *(blocked.check for blocked in self._blocked),
        )
        ingestion = Ingestion(
            EVENT_SCHEMA,
            self._writer,
            on_rejected=next((writer.record for writer in self._rejections), None),
            find_blocked=next((blocked.find for blocked in self._blocked), find_nobody),
            on_blocked=metrics.count_blocked,
        )
        service = IngestService(
            Admission(self._keys, _build_limiter(settings), self._quotas),
            ingestion,
            {HTTP: open_json_codec(settings), GRPC: open_protobuf_codec(settings)},
            timeout_seconds=settings.request_timeout_seconds,
        )
        self._tracing = open_tracing(settings)
        sinks: list[Sink] = [RequestLog(), RejectionLog()]
        self._reporter = None
        if connection := find_socket():
            self._reporter = Reporter(connection, counts, self._refresh_metrics)
            sinks.append(self._request_metrics)
        if self._tracing is not None:
            sinks.append(self._tracing.requests)
        recorder = RequestRecorder(tuple(sinks))
        self._http = self._build_http(service, settings, recorder)
        self._grpc = self._build_grpc(service, settings, recorder)

    def _build_http(
        self, service: IngestService, settings: Settings, recorder: RequestRecorder
    ) -> HTTPServer:
        app = create_app(
            service,
            recorder,
            self._readiness.is_ready,
            description=encode_description(EVENT_SCHEMA, MAX_REQUEST_BYTES),
            allowed_origins=settings.cors_allowed_origins,
        )
        listener = listen(settings.host, settings.port)
        # The application itself refuses what is a little too large; a body far over the limit is
        # not even read.
        return HTTPServer(
            app,
            listener,
            max_body_bytes=2 * MAX_REQUEST_BYTES,
            gate=BodyGate(service.admission, EVENTS_PATH),
            answer_seconds=settings.request_timeout_seconds,
            on_eviction=self._storage_metrics.count_eviction,
        )

    def _build_grpc(
        self, service: IngestService, settings: Settings, recorder: RequestRecorder
    ) -> GrpcServer:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return GrpcServer(
            IngestServicer(service, recorder),
            self._readiness.is_ready,
            address=f"{host}:{settings.grpc_port}",
            offer_reflection=settings.grpc_reflection,
            certificates=CertificateSource(settings.grpc_tls) if settings.grpc_tls else None,
        )

    def run(self, on_ready: Callable[[], None], on_beat: Callable[[], None]) -> None:
        """Serve until `stop` is called, then answer what has been accepted.

        Calls `on_beat` about every second, unless a loop hangs.
        """
        pulse = Pulse(on_beat, lambda: self._http.turned_at, lambda: self._grpc.turned_at)
        with ExitStack() as stack:
            if self._tracing is not None:
                stack.callback(self._tracing.stop)
            watchdog = Watchdog(*self._checks, pulse.check)
            if self._reporter is not None:
                watchdog.watch(self._reporter.report)
                stack.callback(self._reporter.stop)
            stack.enter_context(watchdog)
            for part in (
                self._keys,
                self._quotas,
                *self._blocked,
                *self._rejections,
                self._writer,
                self._readiness,
            ):
                stack.enter_context(part)
            self._grpc.start()
            on_ready()
            self._http.serve()
            self._drain()

    def stop(self) -> None:
        """Make `run` return. Safe in any thread and in a signal handler."""
        self._http.stop()

    def _refresh_metrics(self) -> None:
        self._request_metrics.flush()
        self._storage_metrics.show(self._writer.backlog(), self._keys.known_count())

    def _drain(self) -> None:
        self._readiness.withdraw()
        grpc_drain = threading.Thread(target=self._grpc.stop, args=(_DRAIN_SECONDS,))
        grpc_drain.start()
        self._http.drain(_DRAIN_SECONDS)
        grpc_drain.join()


def _open_rejection_writers(
    settings: Settings, engine: Engine, on_dropped: Callable[[int], None]
) -> list[RejectionWriter]:
    """Return a writer of rejected events in a list, which is empty if they are not kept."""
    keep = settings.rejected_keep
    if keep is None:
        return []
    return [RejectionWriter(GuardedConnection(engine), keep, on_dropped=on_dropped)]


def _open_block_lists(settings: Settings, engine: Engine) -> list[BlockList]:
    """Return the one list of blocked persons, or none if they cannot be recognised."""
    digests = open_digests(settings)
    if digests is None:
        return []
    rows = RowIds(RowEncoder(EVENT_SCHEMA).columns)
    return [BlockList(GuardedConnection(engine), digests, rows)]


def _build_limiter(settings: Settings) -> RateLimiter:
    """Return a limiter, even without a default rate: a key can have rates of its own."""
    return RateLimiter(
        BucketTable(int(os.environ[BUCKETS])),
        event_rate=settings.event_rate_limit,
        byte_rate=settings.byte_rate_limit,
    )


def run_worker(settings: Settings) -> None:
    """Run one worker, started by `run_service`, until a signal or the end of its parent."""
    lifeline = Lifeline.from_environment()
    _raise_file_limit()
    with opened_database(settings) as database_url:
        worker = Worker(settings, database_url)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stop())
        lifeline.on_parent_exit(worker.stop)
        # Modules live for ever; collecting garbage among them took a tenth of the instructions.
        gc.freeze()
        worker.run(lifeline.report_ready, lifeline.report_beat)


def _raise_file_limit() -> None:
    """Raise the soft limit of open files, and so of connections, to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def opened_replay(settings: Settings, engine: Engine) -> Iterator[Replay]:
    """Provide a replay of rejected events that uses the parts of a worker."""
    writer = Writer(
        GuardedConnection(engine),
        EventStore(RowEncoder(EVENT_SCHEMA).columns, open_outbox(settings)),
        max_waiting_bytes=settings.max_waiting_bytes,
    )
    with connected(engine) as connection:
        find_blocked = load_block_list(settings, connection)
    ingestion = Ingestion(EVENT_SCHEMA, writer, find_blocked=find_blocked)
    redactor = open_redactor(settings)
    with Watchdog(writer.check), writer:
        yield Replay(
            ingestion,
            JsonCodec(EVENT_SCHEMA, redactor=redactor),
            ProtobufCodec(EVENT_SCHEMA, redactor=redactor),
            timeout_seconds=settings.request_timeout_seconds,
        )
