"""Who may come in: whose an API key is, and whether its limits and its quota leave room."""

from collections.abc import Sequence
from concurrent.futures import Future

from server.caller import Caller
from server.deadline import Deadline
from server.errors import PermissionDenied, ResourceExhausted
from server.ingest.key_cache import KeyCache
from server.ingest.limits import Allowance, RateLimiter
from server.ingest.quota_account import Grant
from server.ingest.quotas import Quotas


class Admission:
    """Knows callers by their keys and counts what they send.

    None as limiter limits nobody, and without `quotas` nobody has one.
    """

    def __init__(
        self, keys: KeyCache, limiter: RateLimiter | None = None, quotas: Quotas | None = None
    ) -> None:
        self._keys = keys
        self._limiter = limiter
        self._quotas = quotas

    def identify(self, key: str) -> Caller | None:
        """Return a key's caller, or None if it is not cached (then await `look_up`).

        Raises Unauthenticated for a key that is empty, malformed, unknown or revoked.
        """
        return self._keys.known_caller(key)

    def look_up(self, key: str) -> "Future[Caller]":
        """Ask the database whose a key is; see KeyCache.look_up."""
        return self._keys.look_up(key)

    def check_origin(self, caller: Caller, origin: str | None) -> None:
        """Raise PermissionDenied if the key is not for pages of this origin.

        Services send no origin, and could send any: so this is no authentication.
        """
        if caller.origins is not None and origin is not None and origin not in caller.origins:
            raise PermissionDenied

    def take_bytes(self, caller: Caller, size: int) -> None:
        """Count the bytes of a request; raises ResourceExhausted if they are too many now."""
        if self._limiter is not None:
            self._limiter.take_bytes(caller, size)

    def find_room(self, caller: Caller) -> int | None:
        """Return how many bytes a request may have at this moment; None if any number."""
        return None if self._limiter is None else self._limiter.find_room(caller)

    def refuse_bytes(self, caller: Caller) -> ResourceExhausted:
        """Return the error for a request with more bytes than `find_room` has named."""
        assert self._limiter is not None
        return self._limiter.refuse_bytes(caller)

    def take_events(self, caller: Caller, count: int) -> None:
        """Count the events of a request; raises ResourceExhausted if they are too many now."""
        if self._limiter is not None:
            self._limiter.take_events(caller, count)

    def check_quota(self, caller: Caller) -> None:
        """Raise ResourceExhausted if nothing is left of the quota of a caller's project."""
        if caller.quota is not None and self._quotas is not None:
            self._quotas.check_left(caller.project_id)

    def take_quota(self, caller: Caller, count: int, size: int, deadline: Deadline) -> Grant | None:
        """Take the events of a request from its project's quota, if there is one; see Quotas."""
        if caller.quota is None or self._quotas is None:
            return None
        return self._quotas.take(caller.project_id, count, size, deadline)

    def allowances_of(self, caller: Caller) -> Sequence[Allowance]:
        """Return what a caller may still send at this moment; empty if nothing limits it."""
        rates = () if self._limiter is None else self._limiter.allowances_of(caller)
        if caller.quota is None or self._quotas is None:
            return rates
        return [*rates, *self._quotas.allowances_of(caller.project_id)]
