"""What is measured: the loads, each with a name to choose it by."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.choice import choose_matching

_SIZES = (1, 20, 50, 1000)
_WORKERS = (1, 2)
# Fewer than four, and one worker may get none.
_GRPC_CONNECTIONS_PER_WORKER = 4


@dataclass(frozen=True)
class Cell:
    """One load: `streams` are gRPC calls at a time, over all connections."""

    name: str
    server: str  # "service" or "baseline"
    protocol: str
    events_per_request: int
    workers: int
    connections: int
    streams: int = 0
    long_events: bool = False


def _http(events_per_request: int, workers: int) -> Cell:
    name = f"http-{events_per_request}-{workers}"
    connections = 8 if events_per_request == 1000 else 16
    return Cell(name, "service", "http", events_per_request, workers, connections)


def _grpc(events_per_request: int, workers: int) -> Cell:
    name = f"grpc-{events_per_request}-{workers}"
    connections = _GRPC_CONNECTIONS_PER_WORKER * workers
    streams = {1: 64, 1000: 8}.get(events_per_request, 16)
    return Cell(name, "service", "grpc", events_per_request, workers, connections, streams)


def _baseline(events_per_request: int) -> Cell:
    connections = _http(events_per_request, 1).connections
    name = f"baseline-{events_per_request}"
    return Cell(name, "baseline", "http", events_per_request, 1, connections)


BASELINE = tuple(_baseline(size) for size in _SIZES)
MATRIX = tuple(
    kind(size, workers) for workers in _WORKERS for kind in (_http, _grpc) for size in _SIZES
)
# One client that waits for each answer before it sends the next event.
LATENCY = (
    Cell("latency-http", "service", "http", 1, 2, connections=1),
    Cell("latency-grpc", "service", "grpc", 1, 2, connections=1, streams=1),
)
# Eight bodies of 10 MB at once, all for one worker.
MEMORY = Cell("memory", "service", "http", 1000, 1, connections=8, long_events=True)
# The same load on an empty table and on a large one.
EMPTY_TABLE = Cell("empty-table", "service", "http", 1000, 2, connections=8)
LARGE_TABLE = Cell("large-table", "service", "http", 1000, 2, connections=8)

ALL = (*BASELINE, *MATRIX, *LATENCY, MEMORY)
QUICK = (
    "baseline-1000",
    *("http-1-2", "http-50-2", "http-1000-2", "grpc-1-2", "grpc-1000-2"),
    "latency-http",
)


def choose_cells(patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names match one of the patterns; raises ValueError for one without any."""
    return choose_matching(ALL, patterns, "nothing is called {pattern}; there are {names}")
