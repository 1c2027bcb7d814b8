"""A node of the cluster is killed or frozen, under load.

TEST_CITUS_PID_FILE is the `postmaster.pid` of a worker on this machine, and TEST_CITUS_START a
command that starts it again.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from server import storage
from server.storage.connection import open_engine
from tests.citus.borrowing import borrow
from tests.support.load import NOT_STORED, STORED, Load, read_stored, running_load
from tests.support.projects import Project, create_project
from tests.support.services import Service, query, wait_until

borrow(storage)  # skips all of this without a cluster

PROJECTS = 6


class Node:
    """The processes of a worker of the cluster."""

    def __init__(self, pid_file: Path, start: str) -> None:
        self._pid_file = pid_file
        self._start = shlex.split(start)

    def signal(self, number: int) -> None:
        """Send a signal to all of them, to the first one first."""
        first = psutil.Process(int(self._pid_file.read_text().split()[0]))
        for process in (first, *first.children(recursive=True)):
            process.send_signal(number)

    def start(self) -> None:
        """Start it again; it goes on as after a loss of power."""
        subprocess.run(self._start, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def killed(node: Node) -> Iterator[None]:
    """Let no process of the node live meanwhile."""
    node.signal(signal.SIGKILL)
    try:
        yield
    finally:
        node.start()


@contextmanager
def frozen(node: Node) -> Iterator[None]:
    """Let no process of the node run meanwhile."""
    node.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.signal(signal.SIGCONT)


@pytest.fixture
def node() -> Node:
    """Return the node that may be killed."""
    pid_file, start = (os.environ.get(f"TEST_CITUS_{name}") for name in ("PID_FILE", "START"))
    if not (pid_file and start):
        pytest.skip("TEST_CITUS_PID_FILE and TEST_CITUS_START name no node")
    return Node(Path(pid_file), start)


def stores(loads: dict[Project, Load], since: float, count: int) -> bool:
    """Return whether events of each project that were sent since then have been acknowledged."""
    return all(len(load.stored(since)) >= count for load in loads.values())


def is_stored(service: Service, project: Project, load: Load) -> bool:
    """Return whether all that was acknowledged is in the table."""
    return load.stored() <= set(read_stored(service, project))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [killed, frozen])
def test_a_lost_node_loses_no_acknowledged_event(
    lost: Callable[[Node], AbstractContextManager[None]], node: Node, service: Service
) -> None:
    """Clients are answered 503 in time, all goes on with the node, and each event is there once.

    What was acknowledged in the last moment may be seen only when Citus has recovered it.
    """
    with ExitStack() as stack:
        projects = [create_project(service) for _ in range(PROJECTS)]
        loads = {
            project: stack.enter_context(running_load(service, project, http_clients=2))
            for project in projects
        }
        wait_until(lambda: stores(loads, 0.0, 5))
        with lost(node):
            wait_until(lambda: any(load.statuses() & NOT_STORED for load in loads.values()))
            time.sleep(3)
        back_at = time.monotonic()
        wait_until(lambda: stores(loads, back_at, 5))
    query(open_engine(service.database_url), "SELECT recover_prepared_transactions()")
    for project, load in loads.items():
        assert load.statuses() <= STORED | NOT_STORED
        wait_until(partial(is_stored, service, project, load))
        found = read_stored(service, project)
        assert len(found) == len(set(found))
        assert load.longest() < 20
