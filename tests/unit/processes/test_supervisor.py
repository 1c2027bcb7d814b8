"""The parent process, driven for real: processes, signals and sockets."""

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.processes.ports import PortTaken, listen, reserve_ports
from server.processes.pulse import Pulse
from server.processes.supervisor import Program, Supervisor, WorkerFailed
from tests.support.services import ROOT, clean_environment, wait_until

pytestmark = pytest.mark.slow

HOST = "127.0.0.1"

# Its log becomes one JSON object a line on stderr; stdout stays open in the parent and in all
# workers, so that its end of file means that every one of them has exited.
PARENT = """
import json, logging, os, signal, sys, threading
from server.processes.ports import reserve_ports
from server.processes.supervisor import Program, Supervisor

class Lines(logging.Handler):
    def emit(self, record):
        names = ("created", "worker_pid", "exit_status")
        fields = {name: getattr(record, name) for name in names if hasattr(record, name)}
        print(json.dumps({"message": record.getMessage(), **fields}), file=sys.stderr, flush=True)

logging.basicConfig(level="INFO", handlers=[Lines()])
worker, count, drain_seconds = sys.argv[1:]
stop = threading.Event()
with reserve_ports("127.0.0.1", {"PORT": 0}) as ports:
    supervisor = Supervisor(
        Program([sys.executable, worker], {**os.environ, "PORT": str(ports["PORT"])}),
        int(count),
        drain_seconds=float(drain_seconds),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGHUP, lambda *_: supervisor.restart())
    supervisor.start()
    print(ports["PORT"], flush=True)
    supervisor.run(lambda: logging.info("tick"), stop)
    supervisor.stop()
"""

# Answers each connection with its process id. SIGTERM or the parent's exit lets it accept what is
# queued, leave a file named drained-<pid>, and exit. Files beside it make it misbehave.
WORKER = """
import os, pathlib, selectors, signal, socket, sys, time
from server.processes.lifeline import Lifeline
from server.processes.ports import listen

folder = pathlib.Path(__file__).parent
if (folder / "broken").exists():
    sys.exit(7)
wake, woken = socket.socketpair()
if (folder / "stubborn").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: wake.send(b"!"))
lifeline = Lifeline.from_environment()
lifeline.on_parent_exit(lambda: wake.send(b"!"))
listener = listen("127.0.0.1", int(os.environ["PORT"]))
listener.setblocking(False)
listener.listen()
while (folder / "held").exists():
    time.sleep(0.02)
lifeline.report_ready()

def accept():
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        return False
    with connection:
        connection.sendall(str(os.getpid()).encode())
    return True

selector = selectors.DefaultSelector()
for readable in (listener, woken):
    selector.register(readable, selectors.EVENT_READ)
while all(key.fileobj is listener for key, _ in selector.select()):
    accept()
while accept():
    pass
listener.close()
(folder / f"drained-{os.getpid()}").touch()
"""

# Gives a sign of life ten times a second.
BEATING = """
import threading
from server.processes.lifeline import Lifeline

lifeline, over = Lifeline.from_environment(), threading.Event()
lifeline.on_parent_exit(over.set)
lifeline.report_ready()
while not over.wait(0.1):
    lifeline.report_beat()
"""


class Service:
    """A parent in its own process, with what it said and who answers on its port."""

    def __init__(self, folder: Path, count: int, drain_seconds: float) -> None:
        (folder / "parent.py").write_text(PARENT)
        (folder / "worker.py").write_text(WORKER)
        self.folder = folder
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(folder / "parent.py"),
                    str(folder / "worker.py"),
                    str(count),
                    str(drain_seconds),
                ],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self.process.stdout
        self.port = int(self.process.stdout.readline() or pytest.fail(self._log.read_text()))

    def records(self, message: str) -> list[dict[str, float]]:
        """Return the fields of the log records with this message, in order."""
        lines = self._log.read_text().rpartition("\n")[0].splitlines()
        records = [json.loads(line) for line in lines if line.startswith("{")]
        return [record for record in records if record["message"] == message]

    def started(self) -> list[int]:
        """Return the process ids of all workers that were ever started, in order."""
        return [int(record["worker_pid"]) for record in self.records("worker started")]

    def exited(self) -> set[int]:
        """Return the process ids of the workers whose exit the parent saw."""
        return {int(record["worker_pid"]) for record in self.records("worker exited")}

    def answering(self, connections: int = 20) -> set[int]:
        """Return the process ids that answer; a refused connection is an error."""
        return {self._ask() for _ in range(connections)}

    def _ask(self) -> int:
        for _ in range(3):
            # A killed worker resets what was queued on its listener; another one then answers.
            try:
                with socket.create_connection((HOST, self.port), timeout=60) as connection:
                    if answer := connection.recv(64):
                        return int(answer)
            except ConnectionResetError:
                continue
        raise AssertionError("no worker answers")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the parent."""
        self.process.send_signal(number)

    def wait_for_end(self) -> int:
        """Wait until the parent and every worker have exited; return the parent's status."""
        self.process.communicate(timeout=60)
        return self.process.returncode

    def drained(self) -> set[int]:
        """Return the process ids of the workers that exited in their own time."""
        return {int(path.name.partition("-")[2]) for path in self.folder.glob("drained-*")}


Serve = Callable[..., Service]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start services, and see to it that nothing of them is left."""
    services = []

    def start(count: int, drain_seconds: float = 10.0) -> Service:
        services.append(Service(tmp_path, count, drain_seconds))
        return services[-1]

    yield start
    for service in services:
        service.process.kill()
        try:
            service.wait_for_end()
        except subprocess.TimeoutExpired:
            for pid in set(service.started()) - service.exited():
                os.kill(pid, signal.SIGKILL)
            raise


def bound(*options: int, port: int = 0) -> socket.socket:
    """Return a stranger's listener, with socket options of its choice."""
    stranger = socket.socket()
    try:
        for option in options:
            stranger.setsockopt(socket.SOL_SOCKET, option, 1)
        stranger.bind((HOST, port))
        stranger.listen()
    except OSError:
        stranger.close()
        raise
    return stranger


REUSE = [(), (socket.SO_REUSEADDR,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)]


@pytest.mark.parametrize("options", REUSE)
def test_a_foreign_listeners_port_is_refused_in_one_line(options: tuple[int, ...]) -> None:
    """A port that somebody listens on is refused in one line, whatever options they set."""
    with bound(*options) as stranger:
        port = stranger.getsockname()[1]
        with (
            pytest.raises(PortTaken, match=rf"^port {port} is already in use \(GRPC_PORT\)$"),
            reserve_ports(HOST, {"PORT": 0, "GRPC_PORT": port}),
        ):
            pass


@pytest.mark.parametrize("options", REUSE[:2])
def test_a_reserved_port_keeps_strangers_out(options: tuple[int, ...]) -> None:
    """A reserved port cannot be taken while no worker listens on it."""
    with reserve_ports(HOST, {"PORT": 0}) as ports:
        with pytest.raises(OSError, match="in use") as refusal:
            bound(*options, port=ports["PORT"])
        assert refusal.value.errno == errno.EADDRINUSE


def test_a_reserved_port_keeps_a_second_service_out() -> None:
    """A port reserved by one service is taken for the next, even before its workers listen."""
    with reserve_ports(HOST, {"PORT": 0}) as ports:
        with pytest.raises(PortTaken), reserve_ports(HOST, ports):
            pass
        with listen(HOST, ports["PORT"]) as worker:
            worker.listen()
            with pytest.raises(PortTaken), reserve_ports(HOST, ports):
                pass


def test_one_port_for_two_settings_is_refused() -> None:
    """Two settings with the same port: the second is refused."""
    with bound() as stranger:
        port = stranger.getsockname()[1]
    with (
        pytest.raises(PortTaken, match="GRPC_PORT"),
        reserve_ports(HOST, {"PORT": port, "GRPC_PORT": port}),
    ):
        pass


def test_port_0_yields_a_reserved_number() -> None:
    """Port 0 yields a real number, kept for as long as the reservation lasts."""
    with reserve_ports(HOST, {"PORT": 0, "GRPC_PORT": 0}) as ports:
        assert 0 not in ports.values()
        assert len(set(ports.values())) == 2
    for port in ports.values():
        bound(port=port).close()


def test_a_reserved_port_accepts_nothing_until_workers_listen() -> None:
    """A reserved port refuses connections until a worker listens, and workers share it."""
    with reserve_ports(HOST, {"PORT": 0}) as ports:
        address = (HOST, ports["PORT"])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        with listen(*address) as one, listen(*address) as other:
            one.listen()
            other.listen()
            one.close()
            with socket.create_connection(address), other.accept()[0]:
                pass


@pytest.mark.parametrize("ours", [True, False])
def test_connections_in_time_wait_do_not_prevent_a_start(ours: bool) -> None:
    """Connections in TIME_WAIT, ours or another program's, keep no service from starting."""
    with listen(HOST, 0) if ours else bound(socket.SO_REUSEADDR) as earlier:
        earlier.listen()
        address = earlier.getsockname()
        with socket.create_connection(address) as client:
            earlier.accept()[0].close()  # who closes first has the TIME_WAIT
            assert client.recv(1) == b""
    with pytest.raises(OSError, match="in use"):
        bound(port=address[1])
    with reserve_ports(HOST, {"PORT": address[1]}), listen(*address) as worker:
        with pytest.raises(OSError, match="in use"):
            bound(socket.SO_REUSEADDR, port=address[1])
        worker.listen()


def test_ipv6_hosts_work_and_cover_ipv4() -> None:
    """An IPv6 host works, and :: stands for every IPv4 address too."""
    try:
        listen("::1", 0).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with reserve_ports("::1", {"PORT": 0}) as ports, listen("::1", ports["PORT"]) as worker:
        worker.listen()
        socket.create_connection(("::1", ports["PORT"])).close()
    with reserve_ports("::", {"PORT": 0}) as ports, listen("::", ports["PORT"]) as worker:
        worker.listen()
        socket.create_connection((HOST, ports["PORT"])).close()
    with bound() as stranger, pytest.raises(PortTaken):
        reserve_ports("::", {"PORT": stranger.getsockname()[1]}).__enter__()


@pytest.mark.parametrize("host", ["host.invalid", "a..b\n", "192.0.2.1"])
def test_an_unusable_host_is_reported_in_one_line(host: str) -> None:
    """A host that does not resolve, or is not this machine's, is told in one line."""
    with pytest.raises(PortTaken) as refusal, reserve_ports(host, {"PORT": 8080}):
        pass
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"cannot listen on {host!r} port 8080: ")
    assert str(refusal.value).endswith(" (HOST, PORT)")


def test_a_privileged_port_is_reported_in_one_line() -> None:
    """A port that needs more rights than the user has is told in one line."""
    limit = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if limit.exists() and int(limit.read_text()) <= 1:
        pytest.skip("every port is open to every user here")
    program = (
        "import encodings.idna, os\n"
        "from server.processes.ports import PortTaken, reserve_ports\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: reserve_ports('127.0.0.1', {'PORT': 1}).__enter__()\n"
        "except PortTaken as error: print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert said.stdout == "cannot listen on '127.0.0.1' port 1: Permission denied (HOST, PORT)\n"


def test_a_worker_exiting_early_fails_the_start() -> None:
    """A worker that exits before it is ready fails the start, with its exit status."""
    supervisor = Supervisor(
        Program([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)), 2
    )
    with pytest.raises(WorkerFailed, match="status 3 ") as failure:
        supervisor.start()
    assert failure.value.status == 3


def test_a_missing_command_fails_the_start_cleanly(tmp_path: Path) -> None:
    """A command that cannot be run fails the start, and leaves nothing open."""
    supervisor = Supervisor(Program([str(tmp_path / "missing")], {}), 1)
    with pytest.raises(FileNotFoundError):
        supervisor.start()


def test_a_silent_worker_hangs_until_it_is_heard_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that gives no sign of life is said to hang, beside others that do, until it does."""
    monkeypatch.setattr("server.processes.supervisor._SILENT_SECONDS", 2.0)
    program = Program([sys.executable, "-c", BEATING], clean_environment({}))
    supervisor = Supervisor(program, 2)
    stop = threading.Event()
    watching = threading.Thread(target=supervisor.run, args=(lambda: None, stop))
    caplog.set_level(logging.INFO)
    assert not supervisor.is_serving()
    supervisor.start()
    watching.start()
    try:
        wait_until(supervisor.is_serving)
        [victim, _] = [r.worker_pid for r in caplog.records if r.message == "worker ready"]  # type: ignore[attr-defined]
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: not supervisor.is_serving())
        wait_until(lambda: "worker hangs" in caplog.messages)
        os.kill(victim, signal.SIGCONT)
        wait_until(supervisor.is_serving)
        wait_until(lambda: "worker no longer hangs" in caplog.messages)
    finally:
        stop.set()
        watching.join()
        supervisor.stop()
    assert not supervisor.is_serving()


def test_a_pulse_ends_while_any_loop_stands_still() -> None:
    """A process beats about every second, and not while one of its loops stands still."""
    now, turns, beats = [100.0], [100.0, 100.0], []

    def check(moment: float) -> None:
        now[0] = moment
        pulse.check()

    pulse = Pulse(
        lambda: beats.append(now[0]), lambda: turns[0], lambda: turns[1], clock=lambda: now[0]
    )
    for moment in (100.0, 100.5, 101.0, 101.9, 102.0):
        check(moment)
    assert beats == [100.0, 101.0, 102.0]
    turns[0] = 119.0
    check(120.0)
    assert len(beats) == 3
    turns[1] = 119.0
    check(120.0)
    assert beats[3:] == [120.0]


def test_a_killed_worker_is_replaced_while_others_serve(serve: Serve) -> None:
    """A worker killed with SIGKILL is replaced while the other one serves."""
    service = serve(2)
    victim, survivor = service.started()
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: service.answering(1) and len(service.records("worker ready")) == 3)
    assert service.answering() == {survivor, service.started()[2]}
    (record,) = service.records("worker exited")
    assert (record["worker_pid"], record["exit_status"]) == (victim, -signal.SIGKILL)


def test_workers_drain_and_exit_with_their_parent(serve: Serve) -> None:
    """When the parent is killed, every worker drains and exits, a restarted one too."""
    service = serve(2)
    os.kill(service.started()[0], signal.SIGKILL)
    wait_until(lambda: len(service.records("worker ready")) == 3)
    service.send(signal.SIGKILL)
    service.wait_for_end()
    assert service.drained() == set(service.started()[1:])
    bound(socket.SO_REUSEADDR, port=service.port).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_drain_every_worker(serve: Serve, number: signal.Signals) -> None:
    """SIGTERM, and Ctrl-C in a terminal, drain every worker before the parent exits with 0."""
    service = serve(2)
    os.killpg(service.process.pid, number)  # as a terminal does
    assert service.wait_for_end() == 0
    assert service.drained() == set(service.started())
    assert [record["exit_status"] for record in service.records("worker exited")] == [0, 0]


def test_a_stubborn_worker_is_killed_after_its_drain(serve: Serve, tmp_path: Path) -> None:
    """A worker that ignores SIGTERM is killed once its time to drain is over."""
    (tmp_path / "stubborn").touch()
    service = serve(1, drain_seconds=1.0)
    began = time.monotonic()
    service.send(signal.SIGTERM)
    assert service.wait_for_end() == 0
    assert time.monotonic() - began >= 1.0
    assert [record["exit_status"] for record in service.records("worker exited")] == [-9]


def test_a_rolling_restart_keeps_the_port_answering(serve: Serve) -> None:
    """A rolling restart replaces every worker, one at a time, and the port always answers."""
    service = serve(2)
    before = service.started()
    service.send(signal.SIGHUP)
    wait_until(lambda: service.answering(1) and service.records("rolling restart done"))
    after = service.started()[2:]
    assert service.answering() == set(after)
    assert service.drained() == set(before)
    assert len(after) == 2
    exits = [record["created"] for record in service.records("worker exited")]
    replacements = [record["created"] for record in service.records("worker ready")][2:]
    assert replacements[0] <= exits[0] <= replacements[1] <= exits[1]


def test_a_second_restart_follows_the_first(serve: Serve) -> None:
    """A rolling restart asked for during another one follows it."""
    service = serve(1)
    service.send(signal.SIGHUP)
    wait_until(lambda: len(service.started()) == 2)
    service.send(signal.SIGHUP)
    wait_until(lambda: len(service.records("rolling restart done")) == 2)
    assert service.answering() == {service.started()[2]}


def test_a_failing_restart_keeps_the_old_workers(serve: Serve, tmp_path: Path) -> None:
    """When the replacement fails, the rolling restart ends and the old workers go on serving."""
    service = serve(2)
    (tmp_path / "broken").touch()
    service.send(signal.SIGHUP)
    given_up = "rolling restart given up: a worker exited with status 7 before it was ready"
    wait_until(lambda: service.answering(1) and service.records(given_up))
    assert len(service.started()) == 3
    assert service.answering() == set(service.started()[:2])


def test_a_worker_killed_while_replaced_leaves_one(serve: Serve, tmp_path: Path) -> None:
    """A worker killed while its replacement starts leaves exactly one worker."""
    service = serve(1)
    (before,) = service.started()
    (tmp_path / "held").touch()
    service.send(signal.SIGHUP)
    wait_until(lambda: len(service.started()) == 2)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: service.exited())
    end = time.monotonic()
    wait_until(lambda: time.monotonic() - end > 1.3)  # by then it would have been restarted
    (tmp_path / "held").unlink()
    wait_until(lambda: service.records("rolling restart done"))
    assert service.answering() == {service.started()[1]}
    assert len(service.started()) == 2


def test_a_stop_also_stops_a_replacement(serve: Serve) -> None:
    """A stop in the midst of a rolling restart stops the replacement as well."""
    service = serve(1)
    service.send(signal.SIGHUP)
    wait_until(lambda: len(service.started()) == 2)
    service.send(signal.SIGTERM)
    assert service.wait_for_end() == 0
    assert service.exited() == set(service.started())


def test_a_crashing_worker_is_started_once_a_second(serve: Serve, tmp_path: Path) -> None:
    """A worker that keeps failing is started once a second, and comes back when it can."""
    service = serve(1)
    (tmp_path / "broken").touch()
    os.kill(service.started()[0], signal.SIGKILL)
    wait_until(lambda: len(service.records("worker exited")) >= 3)
    (tmp_path / "broken").unlink()
    wait_until(lambda: len(service.records("worker ready")) == 2)
    starts = [record["created"] for record in service.records("worker started")]
    exits = [record["created"] for record in service.records("worker exited")]
    pauses = [start - end for end, start in zip(exits, starts[1:], strict=True)]
    assert all(pause >= 0.95 for pause in pauses)
    assert min(pauses) <= 2.0  # the others may be longer, where the parent has to wait for its turn


def test_an_old_worker_is_replaced_at_once(serve: Serve) -> None:
    """A worker that lived for five seconds is replaced at once, and the parent ticks meanwhile."""
    service = serve(1)

    def measure_pause(number: int) -> float:
        """Kill the worker of this number once it is old; return how long there was none."""
        started = service.records("worker started")[number]["created"]
        wait_until(lambda: time.time() - started > 5.0)
        os.kill(service.started()[number], signal.SIGKILL)
        wait_until(lambda: len(service.started()) == number + 2)
        end = service.records("worker exited")[number]["created"]
        return service.records("worker started")[number + 1]["created"] - end

    # A young one is replaced after a second; on a busy machine an old one may be too, by chance.
    assert any(measure_pause(number) < 0.5 for number in range(4))
    wait_until(lambda: len(service.records("tick")) >= 4)
    begun, *_, last = [record["created"] for record in service.records("tick")]
    assert len(service.records("tick")) <= last - begun + 1.5
