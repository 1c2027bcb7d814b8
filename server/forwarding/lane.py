"""The forwarding loop of one provider: claim, send, record.

Order: what a lane has claimed of one session, it sends in the order of the timestamps, one request
after the other; of each project it claims first what has been due longest. Not promised: order
across a retry, or between several forwarders. Providers sort by the time that every event carries.
"""

import asyncio
import logging
import time
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from server import failpoints
from server.errors import Unavailable
from server.forwarding import backoff
from server.forwarding.backoff import backoff_seconds
from server.forwarding.http_client import TOTAL_SECONDS
from server.forwarding.lane_health import LaneHealth
from server.forwarding.queries import Queries
from server.forwarding.round import REQUESTS_IN_FLIGHT, Round, Window, explain_age
from server.forwarding.sender import Sender
from server.storage.lanes import LaneState, see_lane, show_lane
from server.storage.outbox import (
    ClaimLimits,
    Death,
    Lease,
    Outcome,
    bury_expired,
    claim_batch,
    record_outcomes,
)

# Enough for several requests in turn; what a killed forwarder had claimed waits for its end.
LEASE_SECONDS = 60.0
# A round ends so long after its claim, though events may be left.
_ROUND_SECONDS = 15.0
# Within which an answer is recorded that came at the last moment.
_RECORD_SECONDS = 5.0
# Payloads that a claim holds in memory, beside what is made of them.
CLAIM_BYTES = 16 << 20
# A claim takes 1/64 of all that at least, after rounds in which there was no time for a request.
_SMALLEST_SHARE = 1 / 64
_POLL_SECONDS = 1.0
_FULL = 1000
_STOPPED_SECONDS = 15.0
# The longer the queue, the longer it takes to find expired events: it rests so many times as long.
_SEARCH_REST = 20
_SEEN_SECONDS = 10.0
_MAX_TRIED = 1000

_log = logging.getLogger("productgraph.forwarder")


class Lane:
    """Forwards to one provider, whatever becomes of the others."""

    def __init__(
        self, sender: Sender, queries: Queries, health: LaneHealth, *, max_age: timedelta
    ) -> None:
        self._sender = sender
        self._queries = queries
        self._health = health
        self._max_age = max_age
        self._name = sender.provider.name
        self._failures = 0
        self._share = 1.0
        # The project that the last claim ended with: the next one begins behind it.
        self._turn: str | None = None
        self._stop_reason: str | None = None
        # The events that a stopped lane has tried.
        self._tried: deque[tuple[int, int]] = deque(maxlen=_MAX_TRIED)
        self._search_at = self._seen_at = float("-inf")
        # Until a request is sent, the state that a forwarder has left in the database stands.
        self._shown: LaneState | None = None
        self._has_sent = False

    async def run(self) -> None:
        """Forward until the sender is to stop, and then until what is in flight is recorded."""
        while not self._sender.stop.is_set():
            try:
                pause = await self.forward_batch()
                await self._show(pause)
            except Unavailable:
                pause = backoff.SHORTEST_SECONDS
            except Exception:  # noqa: BLE001 - the lane outlives whatever happens
                _log.exception("forwarding failed", extra={"provider": self._name})
                pause = backoff.SHORTEST_SECONDS
            await self._wait(pause)

    async def forward_batch(self) -> float:
        """Send what is due; return how long to wait before the next time, in seconds."""
        if self._stop_reason is not None:
            await self._bury_expired(self._stop_reason)
        begun, lease = time.monotonic(), Lease(uuid4(), LEASE_SECONDS)
        deliveries = await self._queries.run(
            claim_batch, self._name, lease, self._limits(), self._turn
        )
        if not deliveries:
            return _POLL_SECONDS if self._stop_reason is None else _STOPPED_SECONDS
        self._turn = deliveries[-1].project_id
        outcomes = [Outcome(delivery) for delivery in deliveries]
        latest = begun + LEASE_SECONDS - TOTAL_SECONDS - _RECORD_SECONDS
        sent = Round(self._sender, outcomes, Window(begun + _ROUND_SECONDS, latest), self._max_age)
        try:
            await self._send(sent)
        finally:
            failpoints.reach(failpoints.AFTER_PROVIDER)
            await self._queries.run(record_outcomes, self._name, lease.id, outcomes)
        self._report(sent)
        count = sum(len(delivery.events) for delivery in deliveries)
        return self._conclude(sent, is_full=count >= _FULL)

    def _limits(self) -> ClaimLimits:
        if self._stop_reason is not None:
            return ClaimLimits(events=1, bytes=1)
        events = self._sender.provider.max_events * REQUESTS_IN_FLIGHT
        return ClaimLimits(int(events * self._share), int(CLAIM_BYTES * self._share))

    async def _send(self, sent: Round) -> None:
        if self._stop_reason is not None:
            await sent.probe(self._tried)
        else:
            await sent.send(int(self._sender.provider.max_events * self._share))

    def _report(self, sent: Round) -> None:
        self._has_sent = self._has_sent or sent.has_sent
        for reason, count in sent.given_up.items():
            self._health.note_buried(reason, count)
        self._health.end_round()

    def _conclude(self, sent: Round, *, is_full: bool) -> float:
        """Draw the conclusions from a round; return how long to pause."""
        self._adapt(sent)
        stop_reason = sent.stop_reason or (None if sent.has_progressed else self._stop_reason)
        if stop_reason is not None:
            return self._stop(stop_reason)
        if self._stop_reason is not None:
            self._stop_reason = None
            self._health.note_resumption()
            return 0.0
        if not sent.has_sent:
            return 0.0
        if not sent.has_progressed:
            self._failures += 1
            return backoff_seconds(self._failures)
        self._failures = 0
        # If little was due, more gathers meanwhile, and goes in fewer and larger requests.
        return 0.0 if is_full or sent.is_cut_short else _POLL_SECONDS

    def _adapt(self, sent: Round) -> None:
        """Claim half after a round that had no time for a request, and more after one that had."""
        if not sent.is_cut_short:
            self._share = min(1.0, 2 * self._share)
        elif not sent.has_sent:
            self._share = max(_SMALLEST_SHARE, self._share / 2)

    def _stop(self, reason: str) -> float:
        self._stop_reason = reason
        self._health.note_stop(reason)
        return _STOPPED_SECONDS

    async def _bury_expired(self, stop_reason: str) -> None:
        """Give up what has waited for too long: no round does, while the lane is stopped."""
        while (begun := time.monotonic()) >= self._search_at:
            cut = datetime.now(UTC) - self._max_age
            death = Death(explain_age(self._max_age, stop_reason), "")
            limits = ClaimLimits(1_000_000, CLAIM_BYTES)
            buried = await self._queries.run(bury_expired, self._name, limits, cut, death)
            if buried:
                self._health.note_buried(death.reason, buried)
            else:
                took = time.monotonic() - begun
                self._search_at = time.monotonic() + max(_STOPPED_SECONDS, _SEARCH_REST * took)

    async def _show(self, pause: float) -> None:
        """Tell the database how the provider fares, if that has changed."""
        trouble = self._stop_reason or self._health.trouble
        state = LaneState(self._stop_reason, trouble, None if trouble is None else pause)
        if self._has_sent and state != self._shown:
            await self._queries.run(show_lane, self._name, state)
            self._shown, self._seen_at = state, time.monotonic()

    async def _wait(self, seconds: float) -> None:
        """Wait, but not beyond the stop, and say now and then that a forwarder is there."""
        end = time.monotonic() + seconds
        while not self._sender.stop.is_set():
            self._health.log_refused()
            await self._be_seen()
            if (left := end - time.monotonic()) <= 0:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._sender.stop.wait(), min(left, _SEEN_SECONDS))

    async def _be_seen(self) -> None:
        if time.monotonic() - self._seen_at >= _SEEN_SECONDS:
            with suppress(Unavailable):
                await self._queries.run(see_lane, self._name)
                self._seen_at = time.monotonic()
