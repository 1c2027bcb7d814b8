"""Log lines about ingest requests: one for each, and one for what a project keeps doing wrong."""

import logging
import threading
from collections import Counter

from server.ingest.request_record import RequestRecord

_LINES_A_SECOND = 100
_REJECTION_SECONDS = 600.0
# Of projects, fields and reasons together; beyond, the line that was written first is forgotten.
_MAX_REJECTIONS = 1_000

_log = logging.getLogger("productgraph.request")


class RequestLog:
    """Logs requests: at WARNING those that failed through a fault of the service, others at INFO.

    Each level has `lines_a_second` to spend. What was left out is counted in the next line of its
    level, as `omitted`.
    """

    def __init__(self, lines_a_second: int = _LINES_A_SECOND) -> None:
        self._budgets = {
            level: _Budget(lines_a_second) for level in (logging.INFO, logging.WARNING)
        }

    def record(self, request: RequestRecord) -> None:
        """Log one request, or count it."""
        level = logging.WARNING if request.is_fault else logging.INFO
        if not _log.isEnabledFor(level):
            return
        omitted = self._budgets[level].draw(request.ended)
        if omitted is not None:
            _log.log(level, "request", extra=_describe(request, omitted))


class RejectionLog:
    """Warns of rejected events: of each project, field and reason once in `seconds`.

    The client of a 202 may not read it, and nobody else would see that all of its events are
    rejected. What came in between is counted in the next line, as `rejected`.
    """

    def __init__(self, seconds: float = _REJECTION_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        # By project, field and reason: when a line was written, and events rejected since.
        self._seen: dict[tuple[str | None, str, str], tuple[float, int]] = {}

    def record(self, request: RequestRecord) -> None:
        """Count a request's rejected events, and log those whose turn it is."""
        if not request.problems:
            return
        kinds = Counter((field, reason) for field, reason, _ in request.problems)
        for (field, reason), count in kinds.items():
            rejected = self._draw((request.project_id, field, reason), count, request.ended)
            if rejected is not None:
                fields = {"project": request.project_id, "field": field, "reason": reason}
                _log.warning("events rejected", extra={**fields, "rejected": rejected})

    def _draw(self, key: tuple[str | None, str, str], count: int, now: float) -> int | None:
        with self._lock:
            written, before = self._seen.pop(key, (float("-inf"), 0))
            is_due = now - written >= self._seconds
            if len(self._seen) >= _MAX_REJECTIONS:
                del self._seen[next(iter(self._seen))]
            self._seen[key] = (now, 0) if is_due else (written, before + count)
            return before + count if is_due else None


class _Budget:
    def __init__(self, lines_a_second: int) -> None:
        self._lines_a_second = lines_a_second
        self._lock = threading.Lock()
        self._second_began = float("-inf")
        self._written = 0
        self._omitted = 0

    def draw(self, now: float) -> int | None:
        """Return the number of lines omitted since the last one, or None to omit this one too."""
        with self._lock:
            if now - self._second_began >= 1.0:
                self._second_began = now
                self._written = 0
            if self._written >= self._lines_a_second:
                self._omitted += 1
                return None
            self._written += 1
            omitted, self._omitted = self._omitted, 0
            return omitted


def _describe(request: RequestRecord, omitted: int) -> dict[str, object]:
    response = request.response
    fields = {
        "request_id": request.request_id,
        "protocol": request.protocol,
        "status": request.status,
        "reason": request.reason,
        "project": request.project_id,
        "key": request.key_id or None,
        "accepted": response.accepted if response else None,
        "rejected": response.rejected if response else None,
        "bytes": request.size_bytes,
        "duration_ms": round(request.seconds * 1000, 3),
        "omitted": omitted or None,
    }
    return {name: value for name, value in fields.items() if value is not None}
