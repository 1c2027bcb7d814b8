"""How long to wait after failures."""

import random
from collections.abc import Callable

SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 300.0


def backoff_seconds(failures: int, draw: Callable[[], float] = random.random) -> float:
    """Return how long to wait after so many failures: at most 2 s, doubled each time up to 5 min.

    Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    limit = SHORTEST_SECONDS * 2.0 ** min(failures - 1, 16)
    return draw() * min(LONGEST_SECONDS, limit)
