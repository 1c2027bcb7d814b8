"""What is measured: the loads, each with a name to choose it by."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.support.choice import choose_matching

_SIZES = (1, 20, 50, 1000)
_WORKERS = (1, 2)
_GRPC_CONNECTIONS = 4
_MANY_CONNECTIONS = 128


@dataclass(frozen=True)
class Cell:
    """One load: `streams` are gRPC calls, or messages of a stream, at a time.

    They are spread over all connections.

    `events` names the kind of its events, one of those in `events.KINDS`.
    """

    name: str
    server: str  # "service" or "baseline"
    protocol: str
    events_per_request: int
    workers: int
    connections: int
    streams: int = 0
    events: str = "usual"


def _http(events_per_request: int, workers: int) -> Cell:
    name = f"http-{events_per_request}-{workers}"
    connections = 8 if events_per_request == 1000 else 16
    return Cell(name, "service", "http", events_per_request, workers, connections)


def _grpc(events_per_request: int, workers: int) -> Cell:
    name = f"grpc-{events_per_request}-{workers}"
    streams = {1: 64, 1000: 8}.get(events_per_request, 16)
    return Cell(name, "service", "grpc", events_per_request, workers, _GRPC_CONNECTIONS, streams)


def _stream(events_per_request: int) -> Cell:
    # As many messages in flight as gRPC calls have, but on one connection, in one call.
    twin = _grpc(events_per_request, 1)
    return replace(twin, name=f"stream-{events_per_request}-1", protocol="stream", connections=1)


def name_twin(cell_name: str) -> str:
    """Return the name of the baseline's load of the same events and workers."""
    return "-".join(["baseline", *cell_name.split("-")[1:]])


MATRIX = (
    *(kind(size, workers) for workers in _WORKERS for kind in (_http, _grpc) for size in _SIZES),
    replace(_http(1, 2), name="http-1-2-many", connections=_MANY_CONNECTIONS),
    replace(_http(1000, 2), name="http-1000-2-dirty", events="dirty"),
)
BASELINE = tuple(
    replace(cell, name=name_twin(cell.name), server="baseline")
    for cell in MATRIX
    if cell.protocol == "http"
)
# One client that waits for each answer before it sends the next event.
LATENCY = (
    Cell("latency-http", "service", "http", 1, 2, connections=1),
    Cell("latency-grpc", "service", "grpc", 1, 2, connections=1, streams=1),
)
# Eight bodies of 10 MB at once, all for one worker.
MEMORY = Cell("memory", "service", "http", 1000, 1, connections=8, events="long")
# The same load on an empty table and on a large one.
EMPTY_TABLE = Cell("empty-table", "service", "http", 1000, 2, connections=8)
LARGE_TABLE = Cell("large-table", "service", "http", 1000, 2, connections=8)

# One call on one connection, beside the unary calls on several of the same sizes.
STREAMS = tuple(_stream(size) for size in (1, 50, 1000))

ALL = (*BASELINE, *MATRIX, *STREAMS, *LATENCY, MEMORY)
QUICK = (
    *("baseline-1-2", "baseline-50-2", "baseline-1000-2"),
    *("http-1-2", "http-50-2", "http-1000-2", "grpc-1-2", "grpc-1000-2"),
    "latency-http",
)


def choose_cells(patterns: Sequence[str]) -> list[Cell]:
    """Return the cells whose names match a pattern. Raises ValueError if a pattern matches none."""
    return choose_matching(ALL, patterns, "nothing is called {pattern}; there are {names}")
