"""Faults under load: what was acknowledged is in the table, and everyone gets an answer."""

import random
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.request import urlopen

import psutil  # type: ignore[import-untyped]
import pytest

from server.storage.embedded import EmbeddedPostgres
from tests.support import console
from tests.support.console import Pages
from tests.support.events import make_event
from tests.support.load import (
    NOT_STORED,
    STORED,
    Client,
    GrpcClient,
    HttpClient,
    read_stored,
    running_load,
    send,
)
from tests.support.ports import find_ports
from tests.support.projects import Project, create_project
from tests.support.services import (
    Service,
    ask,
    run_command,
    running_service,
    wait_for,
    wait_until,
)

pytestmark = pytest.mark.slow

ANSWER_SECONDS = 12.0
RECOVERY_SECONDS = 30.0
END_SECONDS = 30.0
FREEZE_SECONDS = 15.0
FAST_SECONDS = 4.0
METRICS_SECONDS = 30.0
HEALTH_MEDIAN_SECONDS, HEALTH_SECONDS = 1.0, 4.0

# What an outage leaves in the log, beside a line for each request.
REQUESTS = {"request"}
OUTAGE = ["the database is unavailable", "the database is available again"]

# Of a call whose worker is killed nobody knows whether it was stored. HTTP requests are sent again,
# and lost if the new connection waited for the same worker, too.
LOST_CONNECTION = {"UNAVAILABLE", "ConnectionResetError", "BrokenPipeError"}


@pytest.fixture(scope="module")
def postgres(open_directory: Path) -> Iterator[EmbeddedPostgres]:
    """Provide a PostgreSQL that only these tests use, and no service looks after."""
    with EmbeddedPostgres(open_directory / "faults", create=True) as postgres:
        yield postgres
        postgres.ensure_running()


@pytest.fixture(scope="module")
def exposed(postgres: EmbeddedPostgres) -> Iterator[Service]:
    """Provide a service whose database is at the mercy of these tests."""
    settings = {"DATABASE_URL": postgres.url, **console.SETTINGS}
    assert run_command("migrate", settings=settings).returncode == 0
    with running_service(settings) as service:
        yield service


@pytest.fixture
def project(exposed: Service) -> Project:
    """Return a project of that service."""
    return create_project(exposed)


@pytest.fixture(scope="module")
def pair(open_directory: Path) -> Iterator[Service]:
    """Provide a service of two workers and an embedded PostgreSQL."""
    with running_service({"DATA_DIR": str(open_directory / "pair"), "WORKERS": "2"}) as service:
        yield service


def find_postmaster(directory: Path) -> psutil.Process:
    """Return the first of the processes of a PostgreSQL of ours."""
    return psutil.Process(int((directory / "postgres/postmaster.pid").read_text().split()[0]))


@contextmanager
def stopped(postgres: EmbeddedPostgres, directory: Path) -> Iterator[None]:
    """PostgreSQL is shut down while the context lasts."""
    postmaster = find_postmaster(directory)
    postmaster.send_signal(signal.SIGINT)
    postmaster.wait(60)
    try:
        yield
    finally:
        assert postgres.ensure_running()


@contextmanager
def frozen(directory: Path) -> Iterator[None]:
    """No process of PostgreSQL runs while the context lasts."""
    postmaster = find_postmaster(directory)
    postmaster.suspend()  # it first, so that it makes no more of them
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


@contextmanager
def measured_health(service: Service) -> Iterator[list[float]]:
    """How long each GET of /health took, in seconds; one is sent every 20 ms."""
    times: list[float] = []
    stop = threading.Event()

    def measure() -> None:
        while not stop.wait(0.02):
            started = time.monotonic()
            assert ask(f"{service.http_url}/health") == 200
            times.append(time.monotonic() - started)

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def directory(open_directory: Path) -> Path:
    """Where the PostgreSQL of `postgres` is."""
    return open_directory / "faults"


def test_a_stopped_database_costs_503s_until_its_start(
    postgres: EmbeddedPostgres, directory: Path, exposed: Service, project: Project
) -> None:
    """A stopped database costs 503s that end soon after its start, and two lines of the log."""
    lines = len(exposed.read_log())
    with running_load(exposed, project, http_clients=12, grpc_clients=4) as load:
        wait_until(lambda: load.statuses() >= STORED)
        with stopped(postgres, directory):
            wait_until(lambda: load.statuses() >= NOT_STORED)
            wait_until(lambda: ask(f"{exposed.http_url}/ready") == 503)
            assert ask(f"{exposed.http_url}/health") == 200
        recovered_at = time.monotonic()
        wait_until(lambda: load.stored(recovered_at), RECOVERY_SECONDS)
    assert load.statuses() == STORED | NOT_STORED
    assert load.longest() < ANSWER_SECONDS
    assert load.stored() <= set(read_stored(exposed, project))
    wait_until(lambda: ask(f"{exposed.http_url}/ready") == 200)

    def find_told() -> list[str]:
        told = [record["message"] for record in exposed.read_log()[lines:]]
        return [message for message in told if message not in REQUESTS]

    wait_for(find_told, OUTAGE)


def test_a_frozen_database_delays_answers_but_not_health(
    directory: Path, exposed: Service, project: Project
) -> None:
    """A frozen database delays answers to their deadline, then fails them fast; never health."""
    with running_load(exposed, project, http_clients=40, grpc_clients=8) as load:
        wait_until(lambda: load.statuses() >= STORED)
        with measured_health(exposed) as times, frozen(directory):
            thaw_at = time.monotonic() + FREEZE_SECONDS
            wait_until(lambda: ask(f"{exposed.http_url}/ready") == 503)
            wait_until(lambda: load.statuses() >= NOT_STORED, ANSWER_SECONDS)
            failing_at = time.monotonic() + 1.0
            wait_until(lambda: time.monotonic() >= thaw_at)
        recovered_at = time.monotonic()
        wait_until(lambda: load.stored(recovered_at), RECOVERY_SECONDS)
    assert load.statuses() == STORED | NOT_STORED
    assert load.longest() < ANSWER_SECONDS
    late = [a.seconds for a in load.answers if failing_at <= a.sent_at < thaw_at]
    assert max(late, default=FREEZE_SECONDS) < FAST_SECONDS
    assert statistics.median(times) < HEALTH_MEDIAN_SECONDS
    assert max(times) < HEALTH_SECONDS
    assert load.stored() <= set(read_stored(exposed, project))


@pytest.mark.parametrize("outage", ["stopped", "frozen"])
def test_metrics_are_served_without_the_database(
    outage: str, postgres: EmbeddedPostgres, directory: Path, exposed: Service
) -> None:
    """The metrics are served without the database, and lack what only that knows."""

    def read() -> tuple[bool, bool]:
        """Return whether the database is up, and whether what only it knows is on the same page."""
        with urlopen(exposed.metrics_url, timeout=METRICS_SECONDS) as answer:
            page = answer.read().decode()
        is_up = "productgraph_database_up 1.0" in page
        assert is_up or "productgraph_database_up 0.0" in page
        return is_up, "productgraph_outbox_pending" in page

    wait_until(lambda: read() == (True, True))
    with stopped(postgres, directory) if outage == "stopped" else frozen(directory):
        # A machine that is busy may seem to have no database for a moment before that.
        wait_until(lambda: read() == (False, False))
    wait_until(lambda: read() == (True, True))


def test_a_frozen_database_stops_the_console_alone(
    directory: Path, exposed: Service, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """While ten pages wait for a frozen database, probes, metrics and supervision go on."""
    probes = exposed.metrics_url.removesuffix("metrics")
    with Pages(exposed, 10) as pages:
        wait_until(lambda: pages.statuses[200] > 100)
        quiet = measure_probes(probes, 20)
        with frozen(directory):
            wait_until(lambda: pages.waiting > 10)
            frozen_times = measure_probes(probes, 20)
            assert pages.waiting > 10  # they were answered before those that came first
            [victim] = exposed.find_workers()
            victim.kill()
            victim.wait()
            killed_at = time.monotonic()
            wait_until(lambda: exposed.find_workers() and ask(f"{probes}health") == 200)
            record_testsuite_property("replaced", time.monotonic() - killed_at)
            wait_until(lambda: pages.statuses[503] > 10)
        before = pages.statuses[200]
        wait_until(lambda: pages.statuses[200] > before + 100)
    record_testsuite_property("slowest before and meanwhile", [max(quiet), max(frozen_times)])
    assert set(pages.statuses) == {200, 503}
    assert max(frozen_times) < FAST_SECONDS


def measure_probes(place: str, count: int) -> list[float]:
    """Return how long answers took, in seconds."""
    times: list[float] = []
    for path in ("health", "ready", "metrics") * count:
        started = time.monotonic()
        assert ask(place + path) in (200, 503)
        times.append(time.monotonic() - started)
    return times


@pytest.mark.parametrize("kind", [HttpClient, GrpcClient])
def test_an_outage_answers_unknown_keys_with_503(
    kind: Callable[[Service, str], Client],
    postgres: EmbeddedPostgres,
    directory: Path,
    exposed: Service,
    project: Project,
) -> None:
    """A key that cannot be looked up is answered 503 and not 401; a malformed one still 401."""
    with (
        closing(kind(exposed, project.key)) as unknown,
        closing(kind(exposed, "pgk_nonsense")) as malformed,
    ):
        with stopped(postgres, directory):
            assert send(unknown, [make_event(project.id)]) in NOT_STORED
            assert send(malformed, [make_event(project.id)]) in {"401", "UNAUTHENTICATED"}
        wait_until(lambda: send(unknown, [make_event(project.id)]) in STORED, RECOVERY_SECONDS)


def test_one_worker_answers_while_the_other_is_replaced(pair: Service) -> None:
    """When one of two workers is killed, the other one answers until it is replaced."""
    project = create_project(pair)
    with running_load(pair, project, http_clients=40, grpc_clients=8) as load:
        wait_until(lambda: load.statuses() >= STORED)
        victim, survivor = pair.find_workers()
        victim.kill()
        killed_at = time.monotonic()
        wait_until(lambda: len(load.stored(killed_at)) > 100)
        wait_until(lambda: len(pair.find_workers()) == 2)
        (successor,) = set(pair.find_workers()) - {survivor}
        wait_until(successor.net_connections)
    assert load.statuses() - LOST_CONNECTION == STORED
    assert load.stored() <= set(read_stored(pair, project))


def test_a_killed_parent_takes_its_workers_along(open_directory: Path) -> None:
    """When the parent is killed its workers end, and a new start in its place takes over."""
    ports = dict(zip(("PORT", "GRPC_PORT"), map(str, find_ports(2)), strict=True))
    settings = {"DATA_DIR": str(open_directory / "orphaned"), "WORKERS": "2"} | ports
    with running_service(settings) as service, ExitStack() as stack:
        project, workers = create_project(service), service.find_workers()
        with running_load(service, project, http_clients=8, grpc_clients=4) as load:
            wait_until(lambda: load.statuses() >= STORED)
            service.process.kill()
            _, alive = psutil.wait_procs(workers, END_SECONDS)
            assert not alive
            service.process.wait()
            successor = stack.enter_context(running_service(settings))
            restarted_at = time.monotonic()
            wait_until(lambda: load.stored(restarted_at))
        assert load.stored() <= set(read_stored(successor, project))


def test_the_same_events_from_eight_clients_are_stored_once(pair: Service) -> None:
    """The same events, sent by eight clients at once and in other orders, are stored once."""
    project = create_project(pair)
    events = [make_event(project.id) for _ in range(200)]
    kinds: list[Callable[[Service, str], Client]] = [HttpClient, GrpcClient] * 4

    def send_all(kind: Callable[[Service, str], Client]) -> set[str]:
        shuffled = random.sample(events, len(events))
        with closing(kind(pair, project.key)) as client:
            return {send(client, shuffled[at : at + 10]) for at in range(0, len(events), 10)}

    with ThreadPoolExecutor(len(kinds)) as pool:
        assert set().union(*pool.map(send_all, kinds)) == STORED
    assert sorted(read_stored(pair, project)) == sorted(event["event_id"] for event in events)


def test_two_hundred_disconnecting_clients_harm_nobody(service: Service) -> None:
    """Two hundred clients that leave in the middle of their bodies harm nobody."""
    project = create_project(service)
    (worker,) = service.find_workers()
    head = "POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    head += "Content-Type: application/json\r\n"
    request = f'{head}X-PG-API-Key: {project.key}\r\n\r\n{{"events": ['.encode()
    with closing(HttpClient(service, project.key)) as client:
        assert send(client, [make_event(project.id)]) == "202"
        descriptors = worker.num_fds()
        for _ in range(200):
            with socket.create_connection(("127.0.0.1", service.http_port)) as connection:
                connection.sendall(request)
            assert send(client, [make_event(project.id)]) == "202"
        wait_until(lambda: worker.num_fds() <= descriptors)
