"""What waits for providers that nobody sends to any more: it is given up by its age.

A provider was switched off, or its forwarder is gone for good. Its deliveries would otherwise wait,
and alert, for ever.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from server.errors import Unavailable
from server.forwarding.queries import Queries
from server.forwarding.round import explain_age
from server.storage.lanes import find_abandoned, forget_trouble
from server.storage.outbox import ClaimLimits, Death, bury_expired

# A provider may be another forwarder's, which says every few seconds that it is there.
_UNSEEN_SECONDS = 3600.0
_INTERVAL_SECONDS = 60.0
# The longer the queue, the longer a search takes: it rests so many times as long.
_SEARCH_REST = 20
_LIMITS = ClaimLimits(1_000_000, 16 << 20)

_log = logging.getLogger("productgraph.forwarder")


class AbandonedLanes:
    """Gives up what is too old and waits for a provider that is not enabled."""

    def __init__(
        self,
        queries: Queries,
        enabled: Sequence[str],
        *,
        max_age: timedelta,
        unseen_seconds: float = _UNSEEN_SECONDS,
    ) -> None:
        self._queries = queries
        self._enabled = enabled
        self._max_age = max_age
        self._unseen_seconds = unseen_seconds

    async def run(self, stop: asyncio.Event) -> None:
        """Look every minute until `stop` is set."""
        while not stop.is_set():
            begun = time.monotonic()
            try:
                await self.sweep()
            except Unavailable:
                pass  # logged by those who need the database
            except Exception:  # noqa: BLE001 - it outlives whatever happens
                _log.exception("the outbox cannot be swept")
            pause = max(_INTERVAL_SECONDS, _SEARCH_REST * (time.monotonic() - begun))
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)

    async def sweep(self) -> None:
        """Bury what is too old, for every provider without a forwarder."""
        found = await self._queries.run(find_abandoned, self._enabled, self._unseen_seconds)
        for provider in found:
            await self._queries.run(forget_trouble, provider)
            buried = 0
            while count := await self._bury(provider):
                buried += count
            if buried:
                extra = {"provider": provider, "events": buried}
                _log.warning("events given up, their provider is switched off", extra=extra)

    async def _bury(self, provider: str) -> int:
        cut = datetime.now(UTC) - self._max_age
        death = Death(explain_age(self._max_age, "the provider is switched off"), "")
        return await self._queries.run(bury_expired, provider, _LIMITS, cut, death)
