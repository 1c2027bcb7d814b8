"""A node of the cluster is killed or frozen, under load.

TEST_CITUS_PID_FILE is the `postmaster.pid` of a worker on this machine, and TEST_CITUS_START a
command that starts it again.
"""

import math
import os
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from server import storage
from server.storage.connection import open_engine
from tests.citus.borrowing import borrow
from tests.support.load import NOT_STORED, STORED, Answer, Load, read_stored, running_load
from tests.support.projects import Project, create_project
from tests.support.services import Service, query, wait_until

borrow(storage)  # skips all of this without a cluster

# Of that node, and of the others.
PROJECTS = 3
PLACE = """
SELECT nodeport FROM pg_dist_placement JOIN pg_dist_node USING (groupid)
 WHERE shardid = get_shard_id_for_distribution_column('events', CAST('{project}' AS text))
"""


class Node:
    """The processes of a worker of the cluster."""

    def __init__(self, pid_file: Path, start: str) -> None:
        self._pid_file = pid_file
        self._start = shlex.split(start)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._pid_file.read_text().split()[3])

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


def create_on_both(service: Service, node: Node) -> tuple[list[Project], list[Project]]:
    """Create projects of this node, and projects of others."""
    engine = open_engine(service.database_url)
    here: list[Project] = []
    elsewhere: list[Project] = []
    while min(len(here), len(elsewhere)) < PROJECTS:
        project = create_project(service)
        [[port]] = query(engine, PLACE.format(project=project.id))
        (here if port == node.port else elsewhere).append(project)
    return here[:PROJECTS], elsewhere[:PROJECTS]


def find_answers(load: Load, since: float, until: float) -> list[Answer]:
    """Return the answers to what was sent in this time."""
    return [answer for answer in tuple(load.answers) if since <= answer.sent_at < until]


def show(place: str, load: Load, times: dict[str, tuple[float, float]]) -> None:
    """Print what the clients of a project saw in each of these times."""
    for name, (since, until) in times.items():
        answers = find_answers(load, since, until)
        slowest = max((answer.seconds for answer in answers), default=0.0)
        counts = dict(Counter(answer.status for answer in answers))
        line = f"{place:8} {name:13} {counts}, slowest {slowest:.2f} s"
        print(line)  # noqa: T201 - figures for whoever runs this by hand


@pytest.mark.slow
@pytest.mark.parametrize("lost", [killed, frozen])
def test_projects_of_healthy_nodes_go_on_without_one(
    lost: Callable[[Node], AbstractContextManager[None]], node: Node, service: Service
) -> None:
    """Only the projects of a node that is away are refused, and each event is there once.

    What was acknowledged in the last moment may be seen only when Citus has recovered it.
    """
    here, elsewhere = create_on_both(service, node)
    with ExitStack() as stack:
        loads = {
            project: stack.enter_context(
                running_load(service, project, http_clients=1, grpc_clients=1)
            )
            for project in (*here, *elsewhere)
        }
        wait_until(lambda: stores(loads, 0.0, 10))
        healthy = {project: loads[project] for project in elsewhere}
        lost_at = time.monotonic()
        with lost(node):
            wait_until(lambda: all(loads[project].statuses() & NOT_STORED for project in here))
            refused_at = time.monotonic()
            wait_until(lambda: stores(healthy, refused_at, 2))
            settled_at = time.monotonic()
            time.sleep(8)
            assert service.is_ready()
            back_at = time.monotonic()
        wait_until(lambda: stores(loads, time.monotonic() - 2, 5))
        well_at = time.monotonic()
        time.sleep(2)
    times = {
        "before": (0.0, lost_at),
        "first moments": (lost_at, settled_at),
        "then": (settled_at, back_at - 0.5),
        "return": (back_at - 0.5, well_at),
        "after": (well_at, math.inf),
    }
    for project, load in loads.items():
        show(lost.__name__ if project in here else "healthy", load, times)
    query(open_engine(service.database_url), "SELECT recover_prepared_transactions()")
    for project, load in loads.items():
        assert load.statuses() <= STORED | NOT_STORED
        assert load.longest() < 20
        statuses = {answer.status for answer in find_answers(load, *times["then"])}
        assert statuses <= (NOT_STORED if project in here else STORED)
        wait_until(partial(is_stored, service, project, load))
        found = read_stored(service, project)
        assert len(found) == len(set(found))
