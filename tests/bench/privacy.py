"""What a list of blocked persons, and redaction, cost ingestion.

Each is compared with a service without it, which takes the same load in turn with it: a machine
that grows slower meanwhile slows down both.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import httpx

from server.privacy.digests import Digests
from server.storage.blocked_persons import block_person
from server.storage.connection import connected, open_engine
from tests.bench import cells
from tests.bench.database import BenchDatabase, running_database
from tests.bench.events import PROJECT, make_events
from tests.bench.report import Document, describe
from tests.bench.run import Bench, BenchFailed, OnStep, Plan
from tests.bench.servers import Server, running_workers

_ROUNDS = 3
_SECONDS, _WARM_UP_SECONDS = 2.0, 0.5
_LOADS = ("http-50-1", "grpc-50-1")
_SECRET = "0123456789abcdef0123456789abcdef"
_BLOCKED = (0, 1, 100_000)
# Two fields of each event.
_REDACT = "page.url=no-query,metadata.plan=hash"
# A change of the list is promised to be in force within ten.
_LIST_SECONDS = 60.0


def measure_control(bench: Bench, _database: BenchDatabase, directory: Path) -> Document:
    """Measure two services that are the same: what differs is what cannot be told from nothing."""
    with running_workers(directory, 1) as plain, running_workers(directory, 1) as other:
        return {"no change": _compare(bench, plain, other)}


def measure_blocked(bench: Bench, database: BenchDatabase, directory: Path) -> Document:
    """Measure with nobody blocked, with one, and with 100,000, none of whom sends anything."""
    figures = {}
    digests = Digests(_SECRET)
    with (
        running_workers(directory, 1) as plain,
        running_workers(directory, 1, {"PRIVACY_SECRET": _SECRET}) as blocking,
    ):
        known = 0
        for count in _BLOCKED:
            with connected(open_engine(database.url)) as connection:
                new = [digests.of_user(PROJECT, f"blocked_{n}") for n in range(known, count)]
                block_person(connection, PROJECT, new, digests.mark)
            if count:
                _wait_until_blocked(blocking, database, f"blocked_{count - 1}")
            figures[f"{count:,} blocked"] = _compare(bench, plain, blocking)
            known = count
    return figures


def measure_redaction(bench: Bench, _database: BenchDatabase, directory: Path) -> Document:
    """Measure with two fields of each event redacted."""
    settings = {"PRIVACY_SECRET": _SECRET, "REDACT": _REDACT}
    with (
        running_workers(directory, 1) as plain,
        running_workers(directory, 1, settings) as redacting,
    ):
        return {"two fields redacted": _compare(bench, plain, redacting)}


def _wait_until_blocked(server: Server, database: BenchDatabase, user_id: str) -> None:
    """Send a person's event until none is stored."""
    deadline = time.monotonic() + _LIST_SECONDS
    event = make_events(1)[0] | {"user.id": user_id}
    while time.monotonic() < deadline:
        database.empty()
        answer = httpx.post(
            f"http://127.0.0.1:{server.ports['http']}/v1/events",
            json={"events": [event]},
            headers={"X-PG-API-Key": database.key},
        )
        if answer.status_code != 202:
            raise BenchFailed(f"a probe was answered {answer.status_code}")
        if not database.count_events():
            return
        time.sleep(0.5)
    raise BenchFailed("the list of blocked persons is not in force")


def _compare(bench: Bench, plain: Server, changed: Server) -> Document:
    """Run each load on both services in turn, and put the rounds together."""
    return {
        load: _put_together(
            [_measure_both(bench, plain, changed, load, number) for number in range(_ROUNDS)]
        )
        for load in _LOADS
    }


def _measure_both(
    bench: Bench, plain: Server, changed: Server, load: str, number: int
) -> Mapping[str, Document]:
    [cell] = cells.choose_cells([load])
    sides = {"without": plain, "with": changed}
    return {
        name: describe(bench.measure(sides[name], cell))
        for name in sorted(sides, reverse=number % 2 == 1)
    }


def _put_together(rounds: Sequence[Mapping[str, Document]]) -> Document:
    """Return the medians of the rounds; of the speeds, that of their ratios too."""

    def find_median(side: str, read: Callable[[Document], float]) -> float:
        return median(read(each[side]) for each in rounds)

    ratios = [
        each["with"]["events_per_second"] / each["without"]["events_per_second"] for each in rounds
    ]
    sides = {
        side: {
            "events_per_second": find_median(side, lambda each: each["events_per_second"]),
            "cpu_us_per_event": find_median(side, lambda each: each["cpu_us_per_event"]["service"]),
            "peak_memory_mb": find_median(side, lambda each: each["peak_memory_mb"]),
        }
        for side in ("without", "with")
    }
    return {"rounds": rounds, "speed_ratio": median(ratios)} | sides


PARTS = {"control": measure_control, "blocked": measure_blocked, "redaction": measure_redaction}


def run_privacy(parts: Sequence[str], scale: float, on_step: OnStep) -> Document:
    """Measure these parts, each with its own database. Raises BenchFailed."""
    document: Document = {}
    plan = Plan((), _SECONDS * scale, _WARM_UP_SECONDS * scale)
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            directory = Path(name)
            directory.chmod(0o711)  # PostgreSQL may run under an account of its own
            on_step(f"{part}: starting")
            data = directory / "data"
            with running_database(data) as database:
                bench = Bench(plan, data, database, on_step)
                document |= PARTS[part](bench, database, data)
    return document
