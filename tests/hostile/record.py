"""What a campaign saw: answers, times, and what should not have been."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.patience import PATIENCE

# No answer may take longer.
LIMIT_SECONDS = 5.0 * PATIENCE
# The texts of this many violations are kept; the others are only counted.
_TEXTS = 20


@dataclass
class Record:
    """Filled by all threads of one campaign; times in seconds, memory in MB of 1,000,000 bytes."""

    name: str
    amount: str
    answers: "Counter[str]" = field(default_factory=Counter)
    slowest: float = 0.0
    peak_memory_mb: float = 0.0
    violations: list[str] = field(default_factory=list)
    violation_count: int = 0
    # What else is worth telling, such as a measured rate.
    notes: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, answer: object, seconds: float) -> None:
        """Count an answer by its status; one that took too long is a violation."""
        with self._lock:
            self.answers[str(answer)] += 1
            self.slowest = max(self.slowest, seconds)
        if seconds > LIMIT_SECONDS:
            self.violate(f"answer {answer} took {seconds:.1f} s")

    def violate(self, text: str) -> None:
        """Note something that must not happen."""
        with self._lock:
            self.violation_count += 1
            if len(self.violations) < _TEXTS:
                self.violations.append(text)

    def require(self, condition: object, text: str) -> None:
        """Note a violation unless the condition holds."""
        if not condition:
            self.violate(text)

    @contextmanager
    def timed(self, answer: object) -> Iterator[None]:
        """Count what happens inside as one answer."""
        started_at = time.monotonic()
        yield
        self.add(answer, time.monotonic() - started_at)
