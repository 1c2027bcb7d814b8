"""What a closed loop of requests measures: how many were answered, and how fast."""

from array import array
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Meter:
    """The answers of one period; latencies in seconds."""

    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    # What other answers than success said, and how often.
    failures: "Counter[str]" = field(default_factory=Counter)

    def percentile_ms(self, share: float) -> float:
        """Return the latency under which this share of the requests stayed, in milliseconds."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000
