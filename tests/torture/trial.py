"""One round of one fault, as the fault sees it."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.patience import PATIENCE
from tests.torture.clients import BROKEN, NOT_STORED, STORED
from tests.torture.cluster import Cluster, Setup
from tests.torture.load import Load

# A request is answered after five seconds at the latest; the rest is for a machine that is busy.
ANSWER_SECONDS = 7.0 * PATIENCE

PLAIN = Setup()
WITHOUT_ANSWER = STORED | NOT_STORED | BROKEN
UNAVAILABLE = STORED | NOT_STORED


@dataclass
class Trial:
    """What a round works with, and what it finds wrong besides the invariant."""

    cluster: Cluster
    load: Load
    draw: random.Random
    problems: list[str] = field(default_factory=list)
    # What shows that the fault was in force, for faults that one cannot see otherwise.
    evidence: list[str] = field(default_factory=list)

    def show(self, count: int, what: str) -> None:
        """Note how often the fault showed; if it never did, that is a problem."""
        self.evidence.append(f"{count} {what}")
        if not count:
            self.problems.append(f"the fault was not in force: 0 {what}")

    def wait(self, least: float, most: float) -> None:
        """Wait for a random time, in seconds."""
        time.sleep(self.draw.uniform(least, most))

    def warm_up(self) -> None:
        """Wait until the load is under way, and then for a random moment."""
        self.load.wait_for_answers(5)
        self.wait(0.05, 0.5)

    def recover(self, since: float, limit: float | None = None) -> float:
        """Measure the recovery; if there is a limit, one that takes longer is a problem."""
        seconds = self.load.measure_recovery(since)
        if limit is not None and seconds > limit:
            self.problems.append(f"recovered after {seconds:.1f} s")
        return seconds


# Does its worst in a running load, and returns how long the recovery took, in seconds.
Inject = Callable[[Trial], float]


@dataclass(frozen=True)
class Fault:
    """A fault by name: what it does, how often by default and in a quick run, what is answered."""

    name: str
    inject: Inject
    rounds: int
    quick_rounds: int = 2
    statuses: frozenset[str] = UNAVAILABLE
    setup: Setup = PLAIN
    has_deadline: bool = True
