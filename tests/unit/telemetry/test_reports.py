"""Reports of real processes reach the parent, whatever becomes of the processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from server.storage.health import Watchdog
from server.telemetry.counting import Counts, Kind, Metric, Totals
from server.telemetry.reports import Reporter, ReportReceiver
from tests.support.services import ROOT, clean_environment, wait_until

DONE = Metric(Kind.COUNTER, "done", "Done.", known=((),))
ALIVE = Metric(Kind.GAUGE, "alive", "Alive.", known=((),))
PROCESSES = 500
# Forks processes, each of which counts three times, reports, and is killed at once: no process
# has a moment to tidy up. Prints the process ids.
FORKING = f"""
import os, signal
from server.telemetry.counting import Counts, Kind, Metric
from server.telemetry.reports import Reporter, find_socket

done, alive = Metric(Kind.COUNTER, "done", ""), Metric(Kind.GAUGE, "alive", "")
connection = find_socket()
for _ in range({PROCESSES}):
    if not (child := os.fork()):
        counts = Counts()
        counts.set(alive, 1)
        Reporter(connection, counts, lambda: counts.add(done, 3)).stop()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    print(child, flush=True)
"""
# Counts for as long as it lives.
BUSY = """
import threading
from server.storage.health import Watchdog
from server.telemetry.counting import Counts, Kind, Metric
from server.telemetry.reports import Reporter, find_socket

done, alive = Metric(Kind.COUNTER, "done", ""), Metric(Kind.GAUGE, "alive", "")
counts = Counts()
counts.set(alive, 1)
with Watchdog(Reporter(find_socket(), counts, lambda: counts.add(done, 1)).report):
    threading.Event().wait()
"""


@pytest.fixture
def totals() -> Totals:
    """Where reports are added up."""
    return Totals((DONE, ALIVE), Counts())


@pytest.fixture
def receiver(totals: Totals) -> Iterator[ReportReceiver]:
    """Provide a running receiver."""
    receiver = ReportReceiver(totals)
    receiver.start()
    yield receiver
    receiver.stop()


def read(totals: Totals) -> dict[str, float]:
    """Return the numbers of the two metrics."""
    return {metric.name: sums[()][0] for metric, sums in totals.read()}


def start(program: str, receiver: ReportReceiver, temporary: Path) -> "subprocess.Popen[str]":
    """Run a program that reports to the receiver."""
    settings = {**receiver.environment, "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=clean_environment(settings),
        pass_fds=[receiver.descriptor],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_replaced_processes_leave_totals_and_no_files(
    receiver: ReportReceiver, totals: Totals, tmp_path: Path
) -> None:
    """Of five hundred processes, one after the other, all counts stay and no file or descriptor."""
    descriptors = psutil.Process().num_fds()
    with start(FORKING, receiver, tmp_path) as forking:
        assert forking.stdout is not None
        for number, line in enumerate(forking.stdout, 1):
            receiver.note_exit(int(line))
            assert read(totals)["done"] >= 3 * number
    assert read(totals) == {"done": 3 * PROCESSES, "alive": 0}
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().num_fds() <= descriptors


def test_killed_process_keeps_what_it_reported(
    receiver: ReportReceiver, totals: Totals, tmp_path: Path
) -> None:
    """Reports that a killed process had sent are counted, and then its gauges are dropped."""
    with start(BUSY, receiver, tmp_path) as busy:
        wait_until(lambda: read(totals)["done"] >= 3)
        assert read(totals)["alive"] == 1
        busy.kill()
    receiver.note_exit(busy.pid)
    settled = read(totals)
    assert settled["alive"] == 0
    assert settled["done"] >= 3
    assert read(totals) == settled


def test_halted_parent_holds_up_nobody(totals: Totals) -> None:
    """While the parent takes nothing, counting goes on, and nothing is lost or sent twice."""
    receiver = ReportReceiver(totals)  # not started yet
    counts = Counts()
    connection = socket.socket(fileno=os.dup(receiver.descriptor))
    rounds = 0

    def refresh() -> None:
        nonlocal rounds
        rounds += 1
        for number in range(500):  # the socket is full after some reports
            counts.add(Metric(Kind.COUNTER, f"filler-{number}-{'x' * 200}", ""), 1)
        counts.add(DONE, 1)

    reporter = Reporter(connection, counts, refresh)
    before = None
    while before != rounds:  # until it is full: then refresh is not called any more
        before = rounds
        reporter.report()
    counts.add(DONE, 1000)
    receiver.start()
    with Watchdog(reporter.report):
        wait_until(lambda: read(totals)["done"] >= 1000)
    reporter.stop()
    wait_until(lambda: read(totals)["done"] == 1000 + rounds)
    receiver.stop()
    connection.close()


def test_reporter_outlives_its_parent(totals: Totals) -> None:
    """A process whose parent is gone counts on, and stops without waiting."""
    receiver = ReportReceiver(totals)
    receiver.start()
    connection = socket.socket(fileno=os.dup(receiver.descriptor))
    receiver.stop()
    counts = Counts()
    reporter = Reporter(connection, counts, lambda: counts.add(DONE, 1))
    reporter.report()
    reporter.stop()
    connection.close()


def test_unreadable_report_is_passed_over(receiver: ReportReceiver, totals: Totals) -> None:
    """One message that is no report costs itself alone."""
    with socket.socket(fileno=os.dup(receiver.descriptor)) as connection:
        connection.send(b"nonsense")
        counts = Counts()
        counts.add(DONE, 1)
        for message in counts.take().encode():
            connection.send(message)
    wait_until(lambda: read(totals)["done"] == 1)
