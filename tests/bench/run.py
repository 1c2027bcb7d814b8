"""One run: the raw limit, the baseline and the service, on one machine in one go."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.bench import cells
from tests.bench.cells import Cell
from tests.bench.database import BenchDatabase, running_database
from tests.bench.load import LoadPlan, LoadResult
from tests.bench.processes import read_memory, read_peak_memory, reset_peak_memory
from tests.bench.servers import Server, running_baseline, running_workers
from tests.support.services import ROOT, clean_environment

# How long a worker has to give memory back.
_REST_SECONDS = 5.0


class BenchFailed(Exception):
    """A measurement is worth nothing; the text says why."""


@dataclass(frozen=True)
class Plan:
    """What to measure, and for how long each; `large_rows` 0 leaves the large table out."""

    cells: Sequence[Cell]
    seconds: float
    warm_up_seconds: float
    large_rows: int = 0


@dataclass(frozen=True)
class Measurement:
    """What one load brought; memory is the worst worker's, in MB of 1,000,000 bytes."""

    cell: Cell
    load: LoadResult
    peak_memory_mb: float
    later_memory_mb: float | None = None


@dataclass
class Results:
    """All of a run; the speed of COPY in rows a second, each time that it was measured."""

    postgresql: str = ""
    copies: list[float] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)


# Called with what is being measured now.
OnStep = Callable[[str], None]
OnMeasured = Callable[[Measurement], None]


class Bench:
    """Runs loads one after the other, each on an empty table."""

    def __init__(
        self, plan: Plan, directory: Path, database: BenchDatabase, on_step: OnStep
    ) -> None:
        self._plan = plan
        self._directory = directory
        self._database = database
        self._on_step = on_step
        self._number = 1  # of the next request

    def running_baseline(self, workers: int) -> AbstractContextManager[Server]:
        """Run the baseline on the database of the run."""
        self._on_step(f"starting the baseline, workers: {workers}")
        return running_baseline(self._database, workers)

    def running_service(self, workers: int) -> AbstractContextManager[Server]:
        """Run the service on the database of the run."""
        self._on_step(f"starting the service, workers: {workers}")
        return running_workers(self._directory, workers)

    def measure_copy(self) -> float:
        """Return the raw limit, in rows a second."""
        self._on_step("COPY alone")
        speed, self._number = self._database.measure_copy(self._plan.seconds, self._number)
        return speed

    def measure(self, server: Server, cell: Cell) -> Measurement:
        """Run one load on an empty table. Raises BenchFailed if the result is worthless."""
        self._database.empty()
        return self.measure_on_top(server, cell)

    def measure_on_top(self, server: Server, cell: Cell) -> Measurement:
        """Run one load on the table as it is."""
        self._on_step(cell.name)
        stored_before = self._database.count_events()
        reset_peak_memory(server.workers)
        result = self._run_load(server, cell)
        measurement = Measurement(cell, result, read_peak_memory(server.workers))
        stored = self._database.count_events() - stored_before
        if stored < result.acknowledged_events:
            raise BenchFailed(
                f"{cell.name}: {result.acknowledged_events} events acknowledged, {stored} stored"
            )
        return measurement

    def measure_memory(self, server: Server) -> Measurement:
        """Run the load of large bodies, and look again some seconds later."""
        measured = self.measure(server, cells.MEMORY)
        time.sleep(_REST_SECONDS)
        later = read_memory(server.workers)
        return Measurement(measured.cell, measured.load, measured.peak_memory_mb, later)

    def fill(self, rows: int) -> None:
        """Put this many rows into the empty table."""
        self._database.empty()

        def report(done: int) -> None:
            if done % 500_000 == 0:
                self._on_step(f"filling the table: {done:,} rows")

        self._number = self._database.fill(rows, self._number, report)

    def _run_load(self, server: Server, cell: Cell) -> LoadResult:
        plan = LoadPlan(
            protocol=cell.protocol,
            port=server.ports[cell.protocol],
            key=self._database.key,
            events_per_request=cell.events_per_request,
            connections=cell.connections,
            streams=cell.streams,
            warm_up_seconds=self._plan.warm_up_seconds,
            seconds=self._plan.seconds,
            first_number=self._number,
            workers=server.workers,
            families={
                "service": [server.process],
                "database": self._database.find_postmasters(),
            },
            kind=cell.events,
        )
        result = run_load_process(cell.name, plan)
        self._number = result.next_number
        return result


def run_load_process(name: str, plan: LoadPlan) -> LoadResult:
    """Run a load in a process of its own. Raises BenchFailed if no request succeeds."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.bench.load"],
        cwd=ROOT,
        env=clean_environment({}),
        input=json.dumps(asdict(plan)),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise BenchFailed(f"{name}: {finished.stderr}")
    result = LoadResult(**json.loads(finished.stdout))
    if result.requests == 0:
        raise BenchFailed(f"{name}: no request succeeded: {result.failures}")
    return result


def run_bench(plan: Plan, on_step: OnStep, on_measured: OnMeasured) -> Results:
    """Measure all that is planned, in a temporary directory. Raises BenchFailed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # PostgreSQL may run under an account of its own
        on_step("starting PostgreSQL")
        with running_database(directory / "data") as database:
            bench = Bench(plan, directory / "data", database, on_step)
            results = Results(database.read_version())
            for stage in (_run_baseline, _run_one_worker, _run_two_workers):
                results.copies.append(bench.measure_copy())
                for measurement in stage(bench, plan):
                    results.measurements.append(measurement)
                    on_measured(measurement)
            results.copies.append(bench.measure_copy())
            return results


def _run_baseline(bench: Bench, plan: Plan) -> Iterator[Measurement]:
    for workers in (1, 2):
        if chosen := _choose(plan, "baseline", workers):
            with bench.running_baseline(workers) as server:
                yield from (bench.measure(server, cell) for cell in chosen)


def _run_one_worker(bench: Bench, plan: Plan) -> Iterator[Measurement]:
    chosen = [cell for cell in _choose(plan, "service", 1) if cell is not cells.MEMORY]
    if chosen:
        with bench.running_service(1) as server:
            yield from (bench.measure(server, cell) for cell in chosen)
    if cells.MEMORY in plan.cells:
        with bench.running_service(1) as server:
            yield bench.measure_memory(server)


def _run_two_workers(bench: Bench, plan: Plan) -> Iterator[Measurement]:
    chosen = _choose(plan, "service", 2)
    if not chosen and not plan.large_rows:
        return
    with bench.running_service(2) as server:
        yield from (bench.measure(server, cell) for cell in chosen)
        if plan.large_rows:
            yield bench.measure(server, cells.EMPTY_TABLE)
            bench.fill(plan.large_rows)
            yield bench.measure_on_top(server, cells.LARGE_TABLE)


def _choose(plan: Plan, server: str, workers: int) -> list[Cell]:
    return [c for c in plan.cells if c.server == server and c.workers == workers]
