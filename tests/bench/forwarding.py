"""What forwarding costs ingestion, and how both fare when a provider hangs or much is pending."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

from google.protobuf.json_format import ParseDict
from sqlalchemy import text

from productgraph.internal.v1.frames_pb2 import EventFrames
from productgraph.v1.event_pb2 import Event
from server.database import connected, open_engine, transactional
from server.outbox import claim_batch, read_status
from server.providers import CURRENT_MAPPING_VERSION
from tests.bench.cells import Cell
from tests.bench.database import BenchDatabase, running_database
from tests.bench.events import PROJECT, make_events
from tests.bench.paced_load import PacedPlan, PacedResult, percentile, send_paced
from tests.bench.providers import Providers, running_providers
from tests.bench.run import Bench, BenchFailed, OnStep, Plan
from tests.bench.servers import Server, running_workers
from tests.services import ROOT, clean_environment, run_command

Document = dict[str, Any]

NAMES = ("amplitude", "mixpanel")
_WORKERS = 2
_RATE = 400.0
_ROUNDS = 5
_EVENTS_PER_ROUND = 2000
_WARM_UP_EVENTS = 200
_HANG_SECONDS = 60.0
_CALM_SECONDS = 20.0
# Longer than the lease of what hung, and the longest of the first few backoffs.
_DRAIN_SECONDS = 180.0
_EVENTS_PER_PAYLOAD = 100
_BACKLOG_PAYLOADS = 10_000
_FEW_PAYLOADS = 10
_CLAIMS = 50
_CLAIMED_EVENTS = 1000
_BACKLOG_ROUNDS = 3
_LOAD = Cell("http-1000-2", "service", "http", 1000, _WORKERS, connections=8)
_LOAD_SECONDS = 4.0
_DRAIN_MEASURED_SECONDS = 20.0
_POLL_SECONDS = 0.1

# Rows as the service writes them, by copying one of them.
_PILE_UP = """
WITH kept AS (
    INSERT INTO outbox_payloads (project_id, mapping_version, event_count, events)
    SELECT %s, %s, %s, %s FROM generate_series(1, %s) RETURNING id, event_count
) INSERT INTO outbox_deliveries (payload_id, provider, event_count)
  SELECT id, unnest(%s), event_count FROM kept
"""
_RELEASE = text("UPDATE outbox_deliveries SET due_at = now(), lease = NULL WHERE lease = :lease")


@dataclass
class Side:
    """A service with a PostgreSQL of its own."""

    database: BenchDatabase
    directory: Path
    server: Server
    settings: Mapping[str, str]
    next_number: int = 1

    def send(self, count: int, warm_up: int = 0) -> PacedResult:
        """Sends so many events at the rate; raises BenchFailed where one is not accepted."""
        server, number = self.server, self.next_number
        self.next_number += warm_up + count
        result = send_paced(
            PacedPlan(
                server.ports["http"],
                self.database.key,
                server.workers,
                _RATE,
                warm_up,
                count,
                number,
            )
        )
        if result.failures or len(result.acknowledged) != warm_up + count:
            raise BenchFailed(f"not all events were accepted: {result.failures}")
        return result

    def count_pending(self) -> dict[str, int]:
        """The events that each provider still has to get."""
        with connected(open_engine(self.database.url)) as connection:
            return {lane.provider: lane.pending for lane in read_status(connection)}

    def count_delivered(self) -> int:
        """How many events the providers have got, together."""
        with connected(open_engine(self.database.url)) as connection:
            return sum(lane.delivered for lane in read_status(connection))

    def show_status(self) -> list[str]:
        """The lines of `productgraph forward status`."""
        settings = {"DATA_DIR": str(self.directory)}
        return run_command("forward", "status", settings=settings).stdout.splitlines()

    def wait_until_forwarded(self) -> float:
        """Returns after how many seconds nothing was pending; raises BenchFailed if that fails."""
        started_at = time.monotonic()
        while any((pending := self.count_pending()).values()):
            if time.monotonic() > started_at + _DRAIN_SECONDS:
                raise BenchFailed(f"still pending: {pending}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - started_at


@contextmanager
def running_side(directory: Path, settings: Mapping[str, str]) -> Iterator[Side]:
    """A service as `scripts/serve` runs it, with these settings."""
    with (
        running_database(directory) as database,
        running_workers(directory, _WORKERS, settings) as server,
    ):
        yield Side(database, directory, server, settings)


def measure_cost(directory: Path, providers: Providers, scale: float, on_step: OnStep) -> Document:
    """Ingestion at a moderate rate, with analytics off and on in turns."""
    count, warm_up = round(_EVENTS_PER_ROUND * scale), round(_WARM_UP_EVENTS * scale)
    rounds: list[dict[str, PacedResult]] = []
    with (
        running_side(directory / "off", {"ANALYTICS_ENABLED": "false"}) as off,
        running_side(directory / "on", providers.settings) as on,
    ):
        sides = {"off": off, "on": on}
        status = {"before": on.show_status()}
        for number in range(_ROUNDS):
            results = {}
            for name in sorted(sides, reverse=number % 2 == 1):
                on_step(f"round {number + 1} of {_ROUNDS}, analytics {name}")
                results[name] = sides[name].send(count, warm_up)
                if name == "on":
                    status["during"] = on.show_status()
                    on.wait_until_forwarded()
            rounds.append(results)
        status["after"] = on.show_status()
        sent = {insert_id for results in rounds for insert_id in results["on"].acknowledged}
        arrivals = providers.read_arrivals()
        return {
            "rounds": [
                {name: _describe(result) for name, result in each.items()} for each in rounds
            ],
            "p50_ratio": median(_compare(each, 0.5) for each in rounds),
            "p99_ratio": median(_compare(each, 0.99) for each in rounds),
            "acknowledged": len(sent),
            "arrived": {name: len(sent & arrivals[name].keys()) for name in NAMES},
            "pending": on.count_pending(),
            "status": status,
        }


def _describe(result: PacedResult) -> Document:
    return {"p50_ms": result.percentile_ms(0.5), "p99_ms": result.percentile_ms(0.99)}


def _compare(results: Mapping[str, PacedResult], share: float) -> float:
    return results["on"].percentile_ms(share) / results["off"].percentile_ms(share)


def measure_hang(directory: Path, providers: Providers, scale: float, on_step: OnStep) -> Document:
    """One provider says nothing for a minute: what the other one and ingestion notice."""
    hung, other = NAMES
    with running_side(directory / "on", providers.settings) as side:
        warm_up = round(_WARM_UP_EVENTS * scale)
        on_step("both providers answer")
        calm = side.send(round(_CALM_SECONDS * scale * _RATE), warm_up)
        side.wait_until_forwarded()
        status = {"before": side.show_status()}
        on_step(f"{hung} hangs")
        providers.hang(hung)
        troubled = side.send(round(_HANG_SECONDS * scale * _RATE))
        status["during"] = side.show_status()
        pending = side.count_pending()
        on_step(f"{hung} answers again")
        providers.answer(hung)
        drained_seconds = side.wait_until_forwarded()
        status["after"] = side.show_status()
        arrivals = providers.read_arrivals()
        sent = calm.acknowledged | troubled.acknowledged
        return {
            "hung": hung,
            "other": other,
            "before": _describe(calm) | _describe_lag(calm, arrivals[other]),
            "during": _describe(troubled) | _describe_lag(troubled, arrivals[other]),
            "pending_after_the_hang": pending,
            "drained_seconds": drained_seconds,
            "acknowledged": len(sent),
            "arrived": {name: len(sent.keys() & arrivals[name].keys()) for name in NAMES},
            "pending": side.count_pending(),
            "status": status,
        }


def _describe_lag(result: PacedResult, arrivals: Mapping[str, float]) -> Document:
    """From acknowledgement to arrival; none where the arrival was seen first."""
    lags = [
        max(0.0, arrivals[insert_id] - acknowledged_at) * 1000
        for insert_id, acknowledged_at in result.acknowledged.items()
        if insert_id in arrivals
    ]
    return {"lag_p50_ms": percentile(lags, 0.5), "lag_p99_ms": percentile(lags, 0.99)}


def measure_backlog(
    directory: Path, providers: Providers, scale: float, on_step: OnStep
) -> Document:
    """A backlog of a million events: ingestion and claims with it and without, then the drain."""
    payloads = max(2 * _FEW_PAYLOADS, round(_BACKLOG_PAYLOADS * scale))
    seconds = max(0.5, _LOAD_SECONDS * scale)
    waiting = providers.settings | {"FORWARDERS": "0"}
    with running_side(directory / "on", waiting) as side:
        bench = Bench(Plan([_LOAD], seconds, seconds / 4), directory, side.database, on_step)
        speeds: dict[str, list[float]] = {"without": [], "with": []}
        for number in range(_BACKLOG_ROUNDS):
            for name in sorted(speeds, reverse=number % 2 == 0):
                on_step(f"round {number + 1} of {_BACKLOG_ROUNDS}, {name} a backlog")
                pile_up(side.database, payloads if name == "with" else 0)
                load = bench.measure(side.server, _LOAD).load
                speeds[name].append(load.events / load.seconds)
        claims = {}
        for rows in (_FEW_PAYLOADS, payloads):
            on_step(f"claims with {rows:,} rows pending")
            pile_up(side.database, rows)
            claims[rows] = measure_claims(side.database)
        on_step("the backlog drains")
        drain = _measure_drain(side, _DRAIN_MEASURED_SECONDS * max(0.1, scale))
    few, many = claims.values()
    return {
        "backlog_events": payloads * _EVENTS_PER_PAYLOAD,
        "events_per_second": speeds,
        "speed_ratio": median(speeds["with"]) / median(speeds["without"]),
        "claim_ms": {str(rows): milliseconds for rows, milliseconds in claims.items()},
        "claim_ratio": many / few,
        "drain": drain,
    }


def pile_up(database: BenchDatabase, payloads: int) -> None:
    """Leaves so many payloads, and nothing else, in the outbox, due for both providers."""
    events = [ParseDict(event, Event()) for event in make_events(_EVENTS_PER_PAYLOAD)]
    encoded = EventFrames(events=[event.SerializeToString() for event in events])
    database.execute("TRUNCATE outbox_payloads, outbox_deliveries")
    database.execute(
        _PILE_UP,
        *(PROJECT, CURRENT_MAPPING_VERSION, len(events), encoded.SerializeToString()),
        *(payloads, list(NAMES)),
    )
    # What autovacuum would do in its own time, and in the midst of what is measured.
    for table in ("outbox_payloads", "outbox_deliveries"):
        database.execute(f"VACUUM ANALYZE {table}")


def measure_claims(database: BenchDatabase) -> float:
    """The median time of a claim of ten payloads, in milliseconds."""
    times = []
    with connected(transactional(open_engine(database.url))) as connection:
        for _ in range(_CLAIMS):
            lease, started_at = uuid4(), time.perf_counter()
            claimed = claim_batch(connection, NAMES[0], lease, 60.0, _CLAIMED_EVENTS)
            times.append((time.perf_counter() - started_at) * 1000)
            assert len(claimed) * _EVENTS_PER_PAYLOAD == _CLAIMED_EVENTS
            with connection.begin():
                connection.execute(_RELEASE, {"lease": lease})
    return median(times)


def _measure_drain(side: Side, seconds: float) -> Document:
    """How fast a forwarder delivers what is pending, while events come in at the moderate rate."""
    calm = side.send(round(_RATE * seconds))
    with _running_forwarder(side):
        _wait_for(lambda: side.count_delivered() > 0)
        before, started_at = side.count_delivered(), time.monotonic()
        busy = side.send(round(_RATE * seconds))
        _wait_for(lambda: side.count_delivered() > before)
        delivered, elapsed = side.count_delivered() - before, time.monotonic() - started_at
    return {
        "events_per_second": delivered / elapsed,
        "without_forwarder": _describe(calm),
        "with_forwarder": _describe(busy),
    }


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DRAIN_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise BenchFailed("nothing is forwarded")
        time.sleep(_POLL_SECONDS)


@contextmanager
def _running_forwarder(side: Side) -> Iterator[None]:
    settings = {**side.settings, "DATA_DIR": str(side.directory)}
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "forward"],
        cwd=ROOT,
        env=clean_environment(settings),
        stderr=subprocess.DEVNULL,
    )
    with process:
        try:
            yield
        finally:
            process.terminate()


PARTS = {"cost": measure_cost, "hang": measure_hang, "backlog": measure_backlog}


def run_forwarding(parts: Sequence[str], scale: float, on_step: OnStep) -> Document:
    """Measures these parts, each with a database and stand-ins of its own; raises BenchFailed."""
    document: Document = {}
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="bench-") as name, running_providers() as providers:
            directory = Path(name)
            directory.chmod(0o711)  # PostgreSQL may run under an account of its own
            on_step(f"{part}: starting")
            document[part] = PARTS[part](directory, providers, scale, on_step)
    return document
