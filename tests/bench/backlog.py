"""Ingestion and claims with a backlog of a million events and without, and how it drains."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from uuid import uuid4

from google.protobuf.json_format import ParseDict
from sqlalchemy import text

from productgraph.v1.event_pb2 import Event
from server.events.encoded_events_pb2 import EncodedEvents
from server.forwarding.providers.provider import CURRENT_MAPPING_VERSION
from server.storage.connection import connected, open_engine
from server.storage.outbox import ClaimLimits, Lease, claim_batch
from tests.bench.cells import Cell
from tests.bench.database import BenchDatabase
from tests.bench.events import PROJECT, make_events
from tests.bench.providers import NAMES, Providers
from tests.bench.report import Document
from tests.bench.run import Bench, BenchFailed, OnStep, Plan
from tests.bench.side import (
    DRAIN_SECONDS,
    POLL_SECONDS,
    RATE,
    WORKERS,
    Side,
    describe,
    running_side,
)
from tests.support.services import ROOT, clean_environment

_EVENTS_PER_PAYLOAD = 100
_BACKLOG_PAYLOADS = 10_000
_FEW_PAYLOADS = 10
_CLAIMS = 50
_CLAIMED = ClaimLimits(events=1000, bytes=16 << 20)
_ROUNDS = 3
_LOAD = Cell("http-1000-2", "service", "http", 1000, WORKERS, connections=8)
_LOAD_SECONDS = 4.0
_DRAIN_MEASURED_SECONDS = 20.0

# Rows as the service writes them, made by copying one of them.
_PILE_UP = """
WITH kept AS (
    INSERT INTO outbox_payloads (project_id, mapping_version, event_count, events)
    SELECT %s, %s, %s, %s FROM generate_series(1, %s) RETURNING id, event_count
) INSERT INTO outbox_deliveries (payload_id, provider, event_count)
  SELECT id, unnest(%s), event_count FROM kept
"""
_RELEASE = text("UPDATE outbox_deliveries SET due_at = now(), lease = NULL WHERE lease = :lease")


def measure_backlog(
    directory: Path, providers: Providers, scale: float, on_step: OnStep
) -> Document:
    """Measure ingestion and claims with a million events waiting and without; then drain them."""
    payloads = max(2 * _FEW_PAYLOADS, round(_BACKLOG_PAYLOADS * scale))
    seconds = max(0.5, _LOAD_SECONDS * scale)
    waiting = providers.settings | {"FORWARDERS": "0"}
    with running_side(directory / "on", waiting) as side:
        bench = Bench(Plan([_LOAD], seconds, seconds / 4), directory, side.database, on_step)
        speeds: dict[str, list[float]] = {"without": [], "with": []}
        for number in range(_ROUNDS):
            for name in sorted(speeds, reverse=number % 2 == 0):
                on_step(f"round {number + 1} of {_ROUNDS}, {name} a backlog")
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
    """Leave this many payloads, and nothing else, in the outbox, due for both providers."""
    events = [ParseDict(event, Event()) for event in make_events(_EVENTS_PER_PAYLOAD)]
    encoded = EncodedEvents(events=[event.SerializeToString() for event in events])
    database.execute("TRUNCATE outbox_payloads, outbox_deliveries")
    database.execute(
        _PILE_UP,
        *(PROJECT, CURRENT_MAPPING_VERSION, len(events), encoded.SerializeToString()),
        *(payloads, list(NAMES)),
    )
    # What autovacuum would do in its own time, in the middle of the measurement.
    for table in ("outbox_payloads", "outbox_deliveries"):
        database.execute(f"VACUUM ANALYZE {table}")


def measure_claims(database: BenchDatabase) -> float:
    """Return the median time of a claim of ten payloads, in milliseconds."""
    times = []
    with connected(open_engine(database.url)) as connection:
        for _ in range(_CLAIMS):
            lease, started_at = Lease(uuid4(), 60.0), time.perf_counter()
            claimed = claim_batch(connection, NAMES[0], lease, _CLAIMED)
            times.append((time.perf_counter() - started_at) * 1000)
            assert len(claimed) * _EVENTS_PER_PAYLOAD == _CLAIMED.events
            with connection.begin():
                connection.execute(_RELEASE, {"lease": lease.id})
    return median(times)


def _measure_drain(side: Side, seconds: float) -> Document:
    """Measure how fast a forwarder delivers a backlog while events come in at the moderate rate."""
    calm = side.send(round(RATE * seconds))
    with _running_forwarder(side):
        _wait_for(lambda: side.count_delivered() > 0)
        before, started_at = side.count_delivered(), time.monotonic()
        busy = side.send(round(RATE * seconds))
        _wait_for(lambda: side.count_delivered() > before)
        delivered, elapsed = side.count_delivered() - before, time.monotonic() - started_at
    return {
        "events_per_second": delivered / elapsed,
        "without_forwarder": describe(calm),
        "with_forwarder": describe(busy),
    }


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DRAIN_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise BenchFailed("nothing is forwarded")
        time.sleep(POLL_SECONDS)


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
