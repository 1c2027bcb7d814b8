"""Connections in equal numbers to every worker.

The kernel spreads connections over the workers by a hash, so that of 16 one worker may get 5 and
the other 11: whoever measures the service must not measure that. Connections that a full worker got
are opened again, from another port, until each has its share.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypeVar

from tests.bench.processes import find_owner

_ATTEMPTS_EACH = 40
_ACCEPT_SECONDS = 5.0


class Connection(Protocol):
    """A connection to the service."""

    local_port: int

    def close(self) -> None:
        """End it."""


C = TypeVar("C", bound=Connection)
# How many connections each process has.
Shares: TypeAlias = "Counter[int]"


def open_evenly(
    open_one: Callable[[], C], count: int, workers: Sequence[int]
) -> tuple[list[C], Shares]:
    """Open this many connections, spread as evenly as possible over these processes.

    Raises RuntimeError if chance does not allow it.
    """
    kept: list[C] = []
    surplus: list[C] = []
    shares: Shares = Counter()
    try:
        for _ in range(count * _ATTEMPTS_EACH):
            if len(kept) == count:
                return kept, shares
            connection = open_one()
            owner = _wait_for_owner(connection.local_port, workers)
            wanted = shares[owner] <= min(shares[worker] for worker in workers)
            (kept if wanted else surplus).append(connection)
            shares[owner] += wanted
    finally:
        # Only now, so that none of them gave its port to the next.
        for connection in surplus:
            connection.close()
    raise RuntimeError(f"the connections do not spread over the workers: {shares}")


def _wait_for_owner(local_port: int, workers: Sequence[int]) -> int:
    deadline = time.monotonic() + _ACCEPT_SECONDS
    while (owner := find_owner(local_port, workers)) is None:
        if time.monotonic() > deadline:
            raise RuntimeError("a connection is not accepted by any worker")
        time.sleep(0.005)
    return owner
