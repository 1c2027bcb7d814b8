"""The parent of worker processes: it starts them, replaces those that exit, drains them.

Each worker listens on sockets of its own, which share the ports through SO_REUSEPORT; a lifeline
joins it to the parent.
"""

import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

from server.processes.lifeline import LIFELINE

logger = logging.getLogger("productgraph.workers")

_LOOK_SECONDS = 0.1
_TICK_SECONDS = 1.0
_START_SECONDS = 30.0
_YOUNG_SECONDS = 5.0
_PAUSE_SECONDS = 1.0
# A worker beats every second; one that has been silent for longer than this hangs.
_SILENT_SECONDS = 10.0


class WorkerFailed(Exception):
    """A worker exited before it was ready; `status` is that of `subprocess` (-9: SIGKILL)."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a worker exited with status {status} before it was ready")
        self.status = status


class Program(NamedTuple):
    """A command for workers, with the variables of `environment` and no others.

    They inherit the open file `descriptors`, under the same numbers.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    descriptors: Sequence[int] = ()


class _Worker:
    """A worker process as its parent sees it. Times are those of `time.monotonic`."""

    def __init__(self, program: Program) -> None:
        self._lifeline, theirs = socket.socketpair()
        self._lifeline.setblocking(False)
        with theirs, ExitStack() as undo:
            undo.callback(self._lifeline.close)
            self._process = subprocess.Popen(  # noqa: S603 - the command is the caller's own
                program.command,
                env={**program.environment, LIFELINE: str(theirs.fileno())},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *program.descriptors],
                # Ctrl-C goes to the terminal's whole process group. Only the parent must get it,
                # and it drains the workers with SIGTERM.
                start_new_session=True,
            )
            undo.pop_all()
        self.fields: dict[str, int] = {"worker_pid": self._process.pid}  # of its log records
        self._born = time.monotonic()
        self.deadline = self._born + _START_SECONDS  # to be ready, or gone; then killed
        self.due = 0.0  # when its successor may start after its exit
        self.status: int | None = None
        self.ready = self.leaving = self.hangs = False
        self._heard_at = self._born
        self.successor: _Worker | None = None

    def has_exited(self) -> bool:
        self.status = self._process.poll()
        if self.status is None:
            return False
        self._lifeline.close()
        self.fields["exit_status"] = self.status
        now = time.monotonic()
        self.due = now + _PAUSE_SECONDS if now - self._born < _YOUNG_SECONDS else now
        return True

    def becomes_ready(self) -> bool:
        if self.ready or self.leaving:
            return False
        self.ready = self._hear()
        if self.ready:
            self.deadline = float("inf")
        return self.ready

    def is_serving(self) -> bool:
        return self.ready and not self.leaving

    def is_silent(self) -> bool:
        self._hear()
        return time.monotonic() - self._heard_at > _SILENT_SECONDS

    def _hear(self) -> bool:
        """Return whether the worker has said anything since the last time."""
        with suppress(OSError):  # nothing was said, or the lifeline has just been closed
            if self._lifeline.recv(4096):
                self._heard_at = time.monotonic()
                return True
        return False

    def leave(self, drain_seconds: float) -> None:
        if not self.leaving:
            self.leaving = True
            self.deadline = time.monotonic() + drain_seconds
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.deadline = float("inf")
        self._process.kill()


class Supervisor:
    """Keeps `count` workers running a program.

    `on_exit` is called with the process id of each that exits, and whether it had been told to.
    """

    def __init__(
        self,
        program: Program,
        count: int,
        *,
        drain_seconds: float = 30.0,
        on_exit: Callable[[int, bool], None] | None = None,
    ) -> None:
        self._program = program
        self._count = count
        self._drain_seconds = drain_seconds
        self._on_exit = on_exit
        self._slots: list[_Worker] = []  # the worker of each place, or its last one
        self._running: list[_Worker] = []  # those that start or leave, too
        self._restart_requested = False

    def start(self) -> None:
        """Start all workers and return when each is ready.

        Raises WorkerFailed or OSError after stopping all of them. A worker that is not ready within
        30 seconds is killed, now and later.
        """
        try:
            self._slots = [self._spawn() for _ in range(self._count)]
            while not all(worker.ready for worker in self._slots):
                time.sleep(_LOOK_SECONDS)
                self._watch()
                for worker in self._slots:
                    if worker.status is not None:
                        raise WorkerFailed(worker.status)
        except BaseException:
            self.stop()
            raise

    def run(self, tick: Callable[[], None], stop: threading.Event) -> None:
        """Replace workers that exit, or that are older than a `restart`, until `stop` is set.

        Calls `tick` about every second, between its other work: it must be quick, and what it
        raises ends the run. Does not stop the workers: call `stop` for that.
        """
        restarts = self._restarts()
        next_tick = 0.0
        # Not Event.wait(): it holds a lock for which a signal handler's stop.set() could wait for
        # ever.
        while not stop.is_set():
            self._watch()
            self._revive()
            next(restarts)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK_SECONDS
                tick()
            time.sleep(_LOOK_SECONDS)

    def restart(self) -> None:
        """Ask `run` for a rolling restart: no worker leaves before its replacement is ready.

        A replacement that fails ends the restart, and the other places keep their old workers. Safe
        in a signal handler.
        """
        self._restart_requested = True

    def is_serving(self) -> bool:
        """Return whether a worker is ready and not told to leave, and none hangs; in any thread."""
        serving = [worker for worker in tuple(self._running) if worker.is_serving()]
        return bool(serving) and not any(worker.is_silent() for worker in serving)

    def stop(self) -> None:
        """Let all workers drain (SIGTERM), and kill those that remain after `drain_seconds`."""
        for worker in self._running:
            worker.leave(self._drain_seconds)
        while self._running:
            self._watch()
            time.sleep(_LOOK_SECONDS)

    def _spawn(self) -> _Worker:
        worker = _Worker(self._program)
        self._running.append(worker)
        logger.info("worker started", extra=worker.fields)
        return worker

    def _watch(self) -> None:
        """Note which workers have exited, are ready or hang; kill those that are overdue."""
        for worker in tuple(self._running):
            if worker.has_exited():
                self._running.remove(worker)
                expected = worker.leaving and worker.status == 0
                level = logging.INFO if expected else logging.WARNING
                logger.log(level, "worker exited", extra=worker.fields)
                if self._on_exit is not None:
                    self._on_exit(worker.fields["worker_pid"], expected)
            elif worker.becomes_ready():
                logger.info("worker ready", extra=worker.fields)
            elif time.monotonic() >= worker.deadline:
                logger.error("worker overdue, killing it", extra=worker.fields)
                worker.kill()
            elif worker.is_serving() and worker.is_silent() is not worker.hangs:
                worker.hangs = not worker.hangs
                state = "worker hangs" if worker.hangs else "worker no longer hangs"
                logger.warning(state, extra=worker.fields)

    def _revive(self) -> None:
        """Start a worker in each place whose worker has exited, unless a successor starts."""
        for slot, worker in enumerate(self._slots):
            if worker in self._running or worker.successor in self._running:
                continue
            if time.monotonic() >= worker.due:
                try:
                    self._slots[slot] = self._spawn()
                except OSError as error:
                    worker.due = time.monotonic() + _PAUSE_SECONDS
                    logger.error("cannot start a worker: %s", error)

    def _restarts(self) -> Iterator[None]:
        """Carry out requested rolling restarts, one step each time the iterator is advanced."""
        while True:
            yield
            if not self._restart_requested:
                continue
            self._restart_requested = False
            try:
                for slot in range(self._count):
                    yield from self._replace(slot)
            except (OSError, WorkerFailed) as error:
                logger.error("rolling restart given up: %s", error)
            else:
                logger.info("rolling restart done")

    def _replace(self, slot: int) -> Iterator[None]:
        old = self._slots[slot]
        new = old.successor = self._spawn()
        while not new.ready:
            if new.status is not None:
                raise WorkerFailed(new.status)
            yield
        self._slots[slot] = new
        old.leave(self._drain_seconds)
        while old in self._running:
            yield
