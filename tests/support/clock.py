"""A clock that a test sets."""


class Clock:
    """Stands still unless `now`, in seconds, is moved."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time, in seconds."""
        return self.now
