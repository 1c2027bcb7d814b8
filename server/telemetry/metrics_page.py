"""The page that Prometheus reads: what all workers counted, and what only the parent knows.

Each worker counts in files of its own (prometheus-client's multiprocess mode). When it is gone its
gauges go, and its counters are added to those of the workers before it: however often workers are
replaced, there are two more files than workers have.
"""

import fcntl
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric, make_wsgi_app
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from server.http.server import HTTPServer
from server.storage.outbox import LaneStatus
from server.telemetry.metrics import PREFIX

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

PATH = "/metrics"
# Memory-backed: files that are written this often would keep a disk busy, and block when it is.
_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it
# No process has this number: it is that of all workers that are gone.
_GONE = 0
_NAME = "productgraph-metrics-"
_YOUNG_SECONDS = 60.0
_RESERVED_BYTES = 1 << 18
_WANTED_BYTES = 16 << 20  # enough for as many workers as there can be
_MAX_BODY_BYTES = 1024
_STOP_SECONDS = 2.0
# What the parent runs.
_COMMANDS = ("worker", "forward")

_log = logging.getLogger("productgraph.metrics")


@contextmanager
def opened_directory() -> Iterator[Path]:
    """A new directory for what the workers count, in memory where there is room for that.

    Those of services that were killed are removed.
    """
    place = _find_place()
    _remove_abandoned(place)
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix=_NAME, dir=place, ignore_cleanup_errors=True)
        directory = Path(stack.enter_context(temporary))
        stack.enter_context(_locked(directory))
        for kind in ("counter", "histogram"):
            # A page that is missing when it is written to would end the parent.
            with _file_of_gone(directory, kind).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, _RESERVED_BYTES)
        yield directory


def _find_place() -> Path:
    if os.access(_MEMORY, os.W_OK | os.X_OK):
        if shutil.disk_usage(_MEMORY).free >= _WANTED_BYTES:
            return _MEMORY
        _log.warning("%s is full, metrics are kept on disk", _MEMORY)
    return Path(tempfile.gettempdir())


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises OSError where another process has locked it, or it is not ours to open."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(place: Path) -> None:
    for directory in place.glob(f"{_NAME}*"):
        with suppress(OSError):
            # One that has only just been made may not be locked yet.
            if time.time() - directory.stat().st_mtime > _YOUNG_SECONDS:
                with _locked(directory):
                    shutil.rmtree(directory, ignore_errors=True)


def _file_of_gone(directory: Path, kind: str) -> Path:
    return directory / f"{kind}_{_GONE}.db"


class MetricsPage:
    """A WSGI application: `GET /metrics`, and nothing else.

    `lanes` tells how forwarding stands, or None where that is not known; a lane of `providers` that
    it lacks has had nothing to do.
    """

    def __init__(
        self,
        directory: Path,
        is_database_up: Callable[[], bool],
        lanes: Callable[[], Sequence[LaneStatus] | None],
        *,
        providers: Sequence[str],
    ) -> None:
        self._idle = [LaneStatus(provider, 0, None, 0, 0, None) for provider in providers]
        self._directory = directory
        self._is_database_up = is_database_up
        self._lanes = lanes
        self._restarts = dict.fromkeys(_COMMANDS, 0)
        self._lock = threading.Lock()
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(directory))
        registry.register(self)
        self._render = make_wsgi_app(registry)

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Answers a request."""
        if environ["PATH_INFO"] != PATH:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [f"See {PATH}.\n".encode()]
        with self._lock:
            page: Iterable[bytes] = self._render(environ, start_response)
        return page

    @property
    def environment(self) -> Mapping[str, str]:
        """What a worker needs for its numbers to be on the page: the library reads it."""
        return {"PROMETHEUS_MULTIPROC_DIR": str(self._directory)}

    def note_exit(self, command: str, pid: int, expected: bool) -> None:
        """Keeps the counters of a process that is gone, and drops its gauges."""
        try:
            with self._lock:
                self._restarts[command] += not expected
                mark_process_dead(pid, str(self._directory))
                for file in self._directory.glob(f"*_{pid}.db"):
                    self._add_to_gone(file)
        except Exception:  # noqa: BLE001 - the caller has processes to look after
            _log.exception("what a process had counted is lost")

    def _add_to_gone(self, file: Path) -> None:
        if file.stat().st_size:  # nothing, where the process was killed in the moment of making it
            kind = file.name.partition("_")[0]
            with closing(MmapedDict(str(_file_of_gone(self._directory, kind)))) as gone:
                for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file)):
                    gone.write_value(key, gone.read_value(key)[0] + value, 0.0)
        file.unlink()

    def collect(self) -> Iterator[Metric]:
        """For the registry: the metrics of the parent."""
        build = GaugeMetricFamily(f"{PREFIX}_build_info", "The version.", labels=["version"])
        build.add_metric([_read_version()], 1)
        yield build
        is_up = self._is_database_up()
        yield GaugeMetricFamily(
            f"{PREFIX}_database_up", "1 where the database answers, 0 where not.", int(is_up)
        )
        restarts = CounterMetricFamily(
            f"{PREFIX}_worker_restarts",
            "Processes that died and were replaced.",
            labels=["command"],
        )
        for command, count in self._restarts.items():
            restarts.add_metric([command], count)
        yield restarts
        lanes = self._lanes()
        if is_up and lanes is not None:
            known = {lane.provider: lane for lane in (*self._idle, *lanes)}
            yield from _describe_lanes(known.values(), datetime.now(UTC))


def _describe_lanes(lanes: Iterable[LaneStatus], now: datetime) -> Iterator[Metric]:
    """The same on every machine that shares the database."""
    pending, oldest, dead, stopped = (
        GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["provider"])
        for name, text in (
            ("outbox_pending", "Events that a provider has still to get."),
            ("outbox_oldest_seconds", "Age of the oldest of them; 0 where there is none."),
            ("outbox_dead", "Events that a provider refused for good, not yet retried or purged."),
            ("lane_stopped", "1 where a provider refuses our credentials, 0 where it does not."),
        )
    )
    delivered = CounterMetricFamily(
        f"{PREFIX}_events_delivered", "Events that a provider has taken.", labels=["provider"]
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


class MetricsServer:
    """Serves a page in a thread of its own."""

    def __init__(self, page: MetricsPage, listener: socket.socket) -> None:
        self._server = HTTPServer(page, listener, threads=1, max_body_bytes=_MAX_BODY_BYTES)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Starts answering."""
        self._thread.start()

    def stop(self) -> None:
        """Answers no more."""
        self._server.stop()
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        self._server.serve()
        self._server.drain(0.0)


def _read_version() -> str:
    try:
        return version("productgraph-ingestion")
    except PackageNotFoundError:  # run from a folder
        return "unknown"
