"""How speed and CPU time change with replicas, projects, rows, keys and connections."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path

from tests.bench.database import BenchDatabase, borrowed_database, running_database
from tests.bench.events import Tenant
from tests.bench.filling import Filling, Limits
from tests.bench.idle import idle_connections
from tests.bench.load import LoadPlan
from tests.bench.processes import read_memory
from tests.bench.report import Document, describe_machine
from tests.bench.run import BenchFailed, OnStep, run_load_process
from tests.bench.servers import Server, running_workers

_EVENTS_PER_REQUEST = 20
_CONNECTIONS = 16
# Of all parts but `projects`: the load is never that of one project alone.
_PROJECTS = 20
_WARM_UP_SHARE = 0.5
# Of each load: a machine's own speed changes by the minute, and the median changes less.
_ROUNDS = 3
_REQUESTS_PER_SECOND_OF_TIME = 10


@dataclass(frozen=True)
class Sizes:
    """List the sizes to compare; None rows stand for half of the free disk."""

    replicas: Sequence[int] = (1, 2, 4)
    projects: Sequence[int] = (1, 20, 200, 2000)
    keys: Sequence[int] = (10, 100, 1000)
    rows: Sequence[int | None] = (10_000_000, None)
    busy: int = 200
    idle: int = 2000


QUICK = Sizes((1, 2), (1, 20), (10, 50), (10_000, 20_000), busy=40, idle=100)


@dataclass(frozen=True)
class ScalePlan:
    """What to measure, on which database, and how long its table is filled."""

    sizes: Sizes
    seconds: float
    database_url: str | None = None
    minutes: float = 10.0


OnMeasured = Callable[[Document], None]


class ScaleRun:
    """Runs loads of many projects on one database, and sees that nothing is lost."""

    def __init__(
        self,
        plan: ScalePlan,
        directory: Path,
        database: BenchDatabase,
        on_step: OnStep,
        on_measured: OnMeasured,
    ) -> None:
        self.plan = plan
        self.database = database
        self.on_step = on_step
        self.directory = directory
        self._on_measured = on_measured
        self._postmasters = database.find_postmasters()
        # The events of the load are of now and later, after all that is in the table.
        self.now = datetime.now(UTC)
        month = self.now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        seconds = int((self.now - month).total_seconds()) + 1
        self._number = seconds * _REQUESTS_PER_SECOND_OF_TIME
        self._tenants = 0

    @contextmanager
    def running_replicas(self, count: int, workers: int = 1) -> Iterator[list[Server]]:
        """Run this many services, each with this many workers, on the database."""
        url = self.plan.database_url
        settings = {"DATABASE_URL": url} if url else {}
        with ExitStack() as stack:
            yield [
                stack.enter_context(running_workers(self.directory, workers, settings))
                for _ in range(count)
            ]

    def create_tenants(self, projects: int, keys_each: int = 1) -> list[Tenant]:
        """Create new projects, each with this many keys."""
        first, self._tenants = self._tenants, self._tenants + projects
        names = [f"proj_bench_{first + number:05}" for number in range(projects)] * keys_each
        return list(zip(names, self.database.create_keys(names), strict=True))

    def measure(
        self,
        name: str,
        servers: Sequence[Server],
        tenants: Sequence[Tenant],
        connections: int = _CONNECTIONS,
    ) -> Document:
        """Run a load on the table as it is, and return the round of median throughput.

        Raises BenchFailed if an acknowledged event of any round is missing.
        """
        self.on_step(name)
        rounds = [self._run_round(name, servers, tenants, connections) for _ in range(_ROUNDS)]
        figures = sorted(rounds, key=itemgetter("events_per_second"))[_ROUNDS // 2]
        self._on_measured(figures)
        return figures

    def _run_round(
        self, name: str, servers: Sequence[Server], tenants: Sequence[Tenant], connections: int
    ) -> Document:
        workers = [pid for server in servers for pid in server.workers]
        port, *others = [server.ports["http"] for server in servers]
        before = self._count(tenants)
        plan = LoadPlan(
            protocol="http",
            port=port,
            key="",
            events_per_request=_EVENTS_PER_REQUEST,
            connections=connections,
            streams=0,
            warm_up_seconds=self.plan.seconds * _WARM_UP_SHARE,
            seconds=self.plan.seconds,
            first_number=self._number,
            workers=workers,
            families={
                "service": [server.process for server in servers],
                "database": self._postmasters,
            },
            other_ports=others,
            tenants=tenants,
        )
        load = run_load_process(name, plan)
        self._number = load.next_number
        stored = self._count(tenants) - before
        figures: Document = {
            "name": name,
            "events_per_second": load.events / load.seconds,
            "p50_ms": load.p50_ms,
            "p99_ms": load.p99_ms,
            "cpu_us_per_event": load.cpu_us_per_event,
            "memory_mb": read_memory(workers),
            "acknowledged": load.acknowledged_events,
            "stored": stored,
            "failures": dict(load.failures),
        }
        if stored < load.acknowledged_events:
            raise BenchFailed(f"{name}: acknowledged events are missing: {figures}")
        return figures

    def _count(self, tenants: Sequence[Tenant]) -> int:
        projects = list({project for project, _ in tenants})
        [(count,)] = self.database.query(
            "SELECT count(*) FROM events WHERE project_id = ANY(%s) AND event_timestamp >= %s",
            projects,
            self.now,
        )
        return int(count)


def measure_replicas(run: ScaleRun) -> Iterator[Document]:
    """Measure several services of one worker each on one database."""
    tenants = run.create_tenants(_PROJECTS)
    for count in run.plan.sizes.replicas:
        run.database.empty()
        with run.running_replicas(count) as servers:
            name = f"{count} replica{'s' if count > 1 else ''}"
            yield run.measure(name, servers, tenants, _CONNECTIONS * count)


def measure_projects(run: ScaleRun) -> Iterator[Document]:
    """Measure loads of few and of many projects, whose requests take turns."""
    with run.running_replicas(1) as servers:
        for count in run.plan.sizes.projects:
            run.database.empty()
            tenants = run.create_tenants(count)
            name = f"{count:,} project{'s' if count > 1 else ''}"
            yield run.measure(name, servers, tenants)


def measure_keys(run: ScaleRun) -> Iterator[Document]:
    """Measure loads of few and of many keys of the same number of projects."""
    with run.running_replicas(1) as servers:
        projects = min(_PROJECTS, *run.plan.sizes.keys)
        for count in run.plan.sizes.keys:
            run.database.empty()
            tenants = run.create_tenants(projects, count // projects)
            yield run.measure(f"{len(tenants):,} keys", servers, tenants)


def measure_table(run: ScaleRun) -> Iterator[Document]:
    """Measure an empty table, one of some rows, and one as large as the limits allow."""
    if run.plan.database_url:
        return  # whose disk it is, is not known here
    half = shutil.disk_usage(run.directory).free // 2
    tenants = run.create_tenants(_PROJECTS)
    filling = Filling(run.database, tenants, run.now, run.on_step)
    with run.running_replicas(1) as servers:
        run.database.empty()
        yield run.measure("empty table", servers, tenants)
        for rows in run.plan.sizes.rows:
            filled = filling.fill(Limits(rows, half, run.plan.minutes * 60))
            yield run.measure(f"{filled.rows:,} rows", servers, tenants) | asdict(filled)
            if filled.rows != rows:
                return  # a limit that holds for the next size, too


def measure_connections(run: ScaleRun) -> Iterator[Document]:
    """Measure few busy connections, many, and many beside idle ones, on two workers."""
    tenants, sizes = run.create_tenants(_PROJECTS), run.plan.sizes
    with run.running_replicas(1, workers=2) as servers:
        for busy in (_CONNECTIONS, sizes.busy):
            run.database.empty()
            yield run.measure(f"{busy} busy", servers, tenants, busy)
        run.database.empty()
        with idle_connections(servers[0].ports["http"], sizes.idle) as idle:
            name = f"{sizes.busy} + {sizes.idle:,} idle"
            figures = run.measure(name, servers, tenants, sizes.busy)
            yield figures | {"idle": sizes.idle, "idle_open": idle.count_open()}


PARTS: Mapping[str, Callable[[ScaleRun], Iterator[Document]]] = {
    "replicas": measure_replicas,
    "projects": measure_projects,
    "keys": measure_keys,
    "connections": measure_connections,
    "table": measure_table,
}


def run_scale(
    parts: Sequence[str], plan: ScalePlan, on_step: OnStep, on_measured: OnMeasured
) -> Document:
    """Measure these parts. Raises BenchFailed, or ValueError if the database cannot be used."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # PostgreSQL may run under an account of its own
        on_step("starting PostgreSQL")
        with _using_database(plan, directory / "data") as database:
            run = ScaleRun(plan, directory / "data", database, on_step, on_measured)
            return {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": describe_machine(),
                "postgresql": database.read_version(),
                "nodes": len(database.find_postmasters()),
                "distributed": database.is_distributed,
                "seconds": plan.seconds,
                "parts": {part: list(PARTS[part](run)) for part in parts},
            }


def _using_database(plan: ScalePlan, directory: Path) -> AbstractContextManager[BenchDatabase]:
    if plan.database_url is None:
        return running_database(directory)
    BenchDatabase(plan.database_url).find_postmasters()  # before anything changes
    return borrowed_database(plan.database_url)
