"""The number of events in each few seconds of the last fifteen minutes, kept in memory."""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

PERIOD_SECONDS = 900
STEP_SECONDS = 5


class Totals(NamedTuple):
    """Numbers of events since the service was started."""

    stored: int
    duplicate: int
    rejected: int


class Throughput:
    """Notes the totals at the end of each step of a few seconds.

    Steps that nobody could note, because the process stood still, count as part of the next one.
    """

    def __init__(
        self, read_totals: Callable[[], Totals], clock: Callable[[], float] = time.time
    ) -> None:
        self._read_totals = read_totals
        self._clock = clock
        self._step = self._find_step()
        self._noted = read_totals()
        self._steps: deque[Totals] = deque(maxlen=PERIOD_SECONDS // STEP_SECONDS - 1)

    def note(self) -> None:
        """Note the totals if a step has ended. Quick; call it at least once a step."""
        missed = self._find_step() - self._step
        if missed <= 0:
            return
        self._steps.extend([Totals(0, 0, 0)] * min(missed - 1, PERIOD_SECONDS))
        totals = self._read_totals()
        self._steps.append(_subtract(totals, self._noted))
        self._step += missed
        self._noted = totals

    def describe(self) -> dict[str, object]:
        """Return the steps, the oldest first; the last one has just begun."""
        totals = self._read_totals()
        steps = [*self._steps, _subtract(totals, self._noted)]
        return {
            "step_seconds": STEP_SECONDS,
            "period_seconds": PERIOD_SECONDS,
            "last_step_at": self._step * STEP_SECONDS,
            "now": self._clock(),
            **{name: [getattr(step, name) for step in steps] for name in Totals._fields},
            "totals": totals._asdict(),
        }

    def _find_step(self) -> int:
        return int(self._clock()) // STEP_SECONDS


def _subtract(later: Totals, earlier: Totals) -> Totals:
    return Totals(*(max(0, new - old) for new, old in zip(later, earlier, strict=True)))
