"""A service under a load at a fixed rate, and what it still has to forward."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.storage.connection import connected, open_engine
from server.storage.lanes import read_status
from tests.bench.database import BenchDatabase, running_database
from tests.bench.paced_load import PacedPlan, PacedResult, send_paced
from tests.bench.report import Document
from tests.bench.run import BenchFailed
from tests.bench.servers import Server, running_workers
from tests.support.services import run_command

WORKERS = 2
# Requests a second: a moderate rate.
RATE = 400.0
# Longer than the lease of what hung, and the longest of the first few backoffs.
DRAIN_SECONDS = 180.0
POLL_SECONDS = 0.1


@dataclass
class Side:
    """A service with a PostgreSQL of its own."""

    database: BenchDatabase
    directory: Path
    server: Server
    settings: Mapping[str, str]
    next_number: int = 1

    def send(
        self, count: int, warm_up: int = 0, *, batch: int = 1, rate: float = RATE
    ) -> PacedResult:
        """Send this many requests at this rate. Raises BenchFailed if an event is not accepted.

        `batch` is the events of each.
        """
        server, number = self.server, self.next_number
        self.next_number += warm_up + count
        port, key = server.ports["http"], self.database.key
        result = send_paced(
            PacedPlan(port, key, server.workers, batch, rate, warm_up, count, number)
        )
        if result.failures or len(result.acknowledged) != (warm_up + count) * batch:
            raise BenchFailed(f"not all events were accepted: {result.failures}")
        return result

    def count_pending(self) -> dict[str, int]:
        """Return the number of events that each provider has not received yet."""
        with connected(open_engine(self.database.url)) as connection:
            return {lane.provider: lane.pending for lane in read_status(connection)}

    def count_delivered(self) -> int:
        """Return how many events the providers have received together."""
        with connected(open_engine(self.database.url)) as connection:
            return sum(lane.delivered for lane in read_status(connection))

    def show_status(self) -> list[str]:
        """Return the lines of `productgraph forward status`."""
        settings = {"DATA_DIR": str(self.directory)}
        return run_command("forward", "status", settings=settings).stdout.splitlines()

    def wait_until_forwarded(self) -> float:
        """Return after how many seconds nothing was pending. Raises BenchFailed if that fails."""
        started_at = time.monotonic()
        while any((pending := self.count_pending()).values()):
            if time.monotonic() > started_at + DRAIN_SECONDS:
                raise BenchFailed(f"still pending: {pending}")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - started_at


@contextmanager
def running_side(directory: Path, settings: Mapping[str, str]) -> Iterator[Side]:
    """Run a service as `scripts/serve` does, with these settings."""
    with (
        running_database(directory) as database,
        running_workers(directory, WORKERS, settings) as server,
    ):
        yield Side(database, directory, server, settings)


def describe(result: PacedResult) -> Document:
    """Return the median latency and the 99th percentile."""
    return {"p50_ms": result.percentile_ms(0.5), "p99_ms": result.percentile_ms(0.99)}
