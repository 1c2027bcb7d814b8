"""The keys in use, held in memory, so that a request rarely waits for the database to know one."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import NamedTuple

from server.caller import Caller
from server.errors import IngestError, Internal, Unauthenticated, Unavailable
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict
from server.storage.keys import digest_key, find_callers, is_well_formed, record_use

# A revoked key is refused after the first of these, or the second while the database is away.
_REFRESH_SECONDS = 10.0
_MAX_AGE_SECONDS = 25.0
_RECORD_USE_SECONDS = 60.0
_UNKNOWN_SECONDS = 30.0
_QUERY_SECONDS = 3.0
_MAX_UNKNOWN = 10_000
_MAX_PENDING = 1_000

LOOKUP_RESULTS = _FOUND, _UNKNOWN, _FAILED = "found", "unknown", "failed"

_log = logging.getLogger("productgraph.keys")


class _Entry(NamedTuple):
    caller: Caller
    confirmed_at: float


class KeyCache(DatabaseThread):
    """Tells whose a key is; one thread asks the database for all requests.

    `on_lookups` is told how many keys it was asked for with one of the results `LOOKUP_RESULTS`.
    """

    STOP_SECONDS = _QUERY_SECONDS

    def __init__(
        self,
        connection: GuardedConnection,
        clock: Callable[[], float] = time.monotonic,
        on_lookups: Callable[[str, int], None] | None = None,
    ) -> None:
        super().__init__("keys", connection)
        self._clock = clock
        self._on_lookups = on_lookups
        self._known: dict[bytes, _Entry] = {}
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._pending: dict[bytes, Future[Caller]] = {}
        self._used: set[bytes] = set()
        self._refresh_at = clock() + _REFRESH_SECONDS
        self._record_use_at = clock() + _RECORD_USE_SECONDS
        self._available = True

    def known_caller(self, key: str) -> Caller | None:
        """Whose a key in use is; None where the database must be asked.

        Raises Unauthenticated for a key that is malformed, or is known to belong to none.
        """
        digest = digest_key(key)
        now = self._clock()
        entry = self._known.get(digest)
        if entry is not None and now - entry.confirmed_at < _MAX_AGE_SECONDS:
            self._used.add(digest)
            return entry.caller
        if self._unknown.get(digest, 0.0) > now or not is_well_formed(key):
            raise Unauthenticated
        return None

    def look_up(self, key: str) -> "Future[Caller]":
        """Asks the database whose a well-formed key is.

        The future fails with Unauthenticated or Unavailable. Raises Unavailable at once where the
        database is away or too many keys are being looked up.
        """
        digest = digest_key(key)
        with self._changed:
            if not self._available or self._stopping.is_set():
                raise Unavailable("API keys cannot be looked up")
            if digest not in self._pending:
                if len(self._pending) >= _MAX_PENDING:
                    raise Unavailable("too many API keys are being looked up")
                self._pending[digest] = Future()
                self._changed.notify()
            return self._pending[digest]

    def known_count(self) -> int:
        """How many keys are in memory."""
        return len(self._known)

    def _note_cut(self) -> None:
        self._fail_pending(Unavailable("API keys cannot be looked up"))

    def _run_round(self) -> float:
        self._wait_for_work()
        try:
            self._work()
        except Unavailable as error:
            _log.debug("API keys cannot be looked up", exc_info=error.__cause__)
            self._fail_pending(error)
        except Exception:  # noqa: BLE001 - whatever happens, those who wait are answered
            _log.exception("API keys cannot be looked up")
            self._fail_pending(Internal())
        if not self._available:
            self._available = self._connection.wait_until_available(self._stopping)
        return 0.0

    def _finish(self) -> None:
        self._fail_pending(Unavailable("API keys cannot be looked up"))

    def _wait_for_work(self) -> None:
        with self._changed:
            pause = max(0.0, self._refresh_at - self._clock())
            # A query may be cut in the moment of its success, and nobody asks after that.
            self._changed.wait_for(
                lambda: self._pending or self._stopping.is_set() or not self._available, pause
            )

    def _work(self) -> None:
        if self._pending:
            self._answer(list(self._pending))
        if self._clock() >= self._refresh_at:
            self._refresh()
        if self._clock() >= self._record_use_at or self._stopping.is_set():
            self._record_use()

    def _find(self, digests: Iterable[bytes]) -> dict[bytes, _Entry]:
        asked_at = self._clock()
        with self._connection.connected(_QUERY_SECONDS) as connection:
            callers = find_callers(connection, list(digests))
        return {digest: _Entry(caller, asked_at) for digest, caller in callers.items()}

    def _answer(self, digests: list[bytes]) -> None:
        found = self._find(digests)
        self._tell(_FOUND, len(found))
        self._tell(_UNKNOWN, len(digests) - len(found))
        self._known.update(found)
        for digest in digests:
            with self._changed:
                future = self._pending.pop(digest, None)
            if future is None:
                continue
            if digest in found:
                _settle(future, found[digest].caller)
            else:
                self._remember_unknown(digest)
                _settle(future, Unauthenticated())

    def _remember_unknown(self, digest: bytes) -> None:
        self._unknown[digest] = self._clock() + _UNKNOWN_SECONDS
        if len(self._unknown) > _MAX_UNKNOWN:
            self._unknown.popitem(last=False)

    def _refresh(self) -> None:
        self._refresh_at = self._clock() + _REFRESH_SECONDS
        if self._known:
            self._known = self._find(self._known)

    def _record_use(self) -> None:
        """Also forgets the keys that were not used since the last time."""
        self._record_use_at = self._clock() + _RECORD_USE_SECONDS
        used, self._used = self._used, set()
        if used:
            # Workers may note the same keys at once; the next time is soon enough.
            with suppress(Conflict), self._connection.connected(_QUERY_SECONDS) as connection:
                record_use(connection, used)
        self._known = {digest: self._known[digest] for digest in used if digest in self._known}

    def _fail_pending(self, error: IngestError) -> None:
        with self._changed:
            self._available = not isinstance(error, Unavailable)
            pending, self._pending = self._pending, {}
            self._changed.notify()
        self._tell(_FAILED, len(pending))
        for future in pending.values():
            _settle(future, error)

    def _tell(self, result: str, count: int) -> None:
        if self._on_lookups is not None and count:
            self._on_lookups(result, count)


def _settle(future: "Future[Caller]", result: Caller | IngestError) -> None:
    with suppress(InvalidStateError):
        if isinstance(result, IngestError):
            future.set_exception(result)
        else:
            future.set_result(result)
