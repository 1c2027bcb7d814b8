"""The forwarding loop: claim, send, record. One lane for each provider.

Order: what a lane has claimed of one session, it sends in the order of the timestamps, one request
after the other; and it claims first what has been due longest. Not promised: order across a retry,
or between several forwarders. Providers sort by the time that every event carries.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Concatenate, ParamSpec, TypeVar
from uuid import uuid4
from zlib import crc32

from productgraph.v1.event_pb2 import Event
from server import failpoints
from server.errors import Unavailable
from server.forwarding.http_client import Transport
from server.forwarding.providers.provider import (
    CURRENT_MAPPING_VERSION,
    Answer,
    Decision,
    Provider,
    Request,
)
from server.storage.connection import Connection, GuardedConnection
from server.storage.outbox import Death, Outcome, claim_batch, record_outcomes, set_stopped

P = ParamSpec("P")
T = TypeVar("T")

REQUESTS_IN_FLIGHT = 4
# Fewer events are not worth a request of their own while others are in flight.
_FEW = 500
# Enough for several requests in turn; what a killed forwarder had claimed waits for its end.
LEASE_SECONDS = 60.0
# No request begins with less of the lease left than it may take.
_RESERVE_SECONDS = 45.0
_QUERY_SECONDS = 20.0
_POLL_SECONDS = 1.0
_FULL = 1000
_STOPPED_SECONDS = 15.0
_SHORTEST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 2.0, 300.0
# Kept by a newer release, while this one is still running: left to that one's forwarder.
_NEWER_VERSION_SECONDS = 60.0
# What is in flight when the forwarder is to stop may still be answered for so long.
_STOP_GRACE_SECONDS = 5.0
_MAX_ANSWER_CHARACTERS = 500

_log = logging.getLogger("productgraph.forwarder")


def backoff_seconds(failures: int, draw: Callable[[], float] = random.random) -> float:
    """How long to wait after so many failures: at most 2 s, doubled each time up to 5 min.

    Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    limit = _SHORTEST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16)
    return draw() * min(_LONGEST_BACKOFF_SECONDS, limit)


@dataclass(frozen=True)
class Item:
    """One event on its way: what is sent of it, and where to note what became of it."""

    outcome: Outcome
    position: int
    payload: bytes
    session_id: str
    timestamp: tuple[int, int]
    backoff: float  # seconds, should it have to be sent again; the same for a whole delivery


class Stopped(Exception):
    """The provider takes nothing until the settings are right; the text says why."""


class Lane:
    """Forwards to one provider, whatever becomes of the others."""

    def __init__(
        self,
        provider: Provider,
        transport: Transport,
        connection: GuardedConnection,
        *,
        max_age: timedelta,
    ) -> None:
        self._provider = provider
        self._transport = transport
        self._connection = connection
        self._max_age = max_age
        self._failures = 0
        self._has_progressed = False
        self._stop_event = asyncio.Event()
        # A single event goes first, to find out.
        self._is_stopped = True

    async def run(self, stop: asyncio.Event) -> None:
        """Forwards until `stop` is set, and then until what is in flight is recorded."""
        self._stop_event = stop
        while not stop.is_set():
            try:
                pause = await self.forward_batch()
            except Unavailable:
                pause = _SHORTEST_BACKOFF_SECONDS
            except Exception:  # noqa: BLE001 - the lane outlives whatever happens
                _log.exception("forwarding failed", extra={"provider": self._provider.name})
                pause = _SHORTEST_BACKOFF_SECONDS
            await _wait(stop, pause)

    async def forward_batch(self) -> float:
        """Sends what is due; returns how long to wait before the next time, in seconds."""
        name, lease = self._provider.name, uuid4()
        deadline = time.monotonic() + LEASE_SECONDS - _RESERVE_SECONDS
        limit = 1 if self._is_stopped else self._provider.max_events * REQUESTS_IN_FLIGHT
        deliveries = await self._query(claim_batch, name, lease, LEASE_SECONDS, limit)
        if not deliveries:
            return _POLL_SECONDS
        outcomes = [Outcome(delivery) for delivery in deliveries]
        items = await asyncio.to_thread(self._make_items, outcomes)
        self._has_progressed = False
        queues = (self._send_queue(queue, deadline) for queue in _queue_by_session(items))
        ends = await asyncio.gather(*queues, return_exceptions=True)
        failpoints.reach(failpoints.AFTER_PROVIDER)
        await self._query(record_outcomes, name, lease, outcomes)
        return await self._draw_conclusion(ends, len(items))

    async def _draw_conclusion(self, ends: Iterable[BaseException | None], count: int) -> float:
        for end in ends:
            if isinstance(end, Stopped):
                return await self._stop(str(end))
            if end is not None:
                raise end
        if not count:
            return 0.0
        if self._has_progressed:
            self._failures = 0
            await self._resume()
            # Where little was due, more gathers meanwhile, and goes in fewer and larger requests.
            return 0.0 if count >= _FULL else _POLL_SECONDS
        self._failures += 1
        return backoff_seconds(self._failures)

    async def _stop(self, reason: str) -> float:
        _log.error(
            "forwarding stopped until the settings are right",
            extra={"provider": self._provider.name, "reason": reason},
        )
        self._is_stopped = True
        await self._query(set_stopped, self._provider.name, reason)
        return _STOPPED_SECONDS

    async def _resume(self) -> None:
        if self._is_stopped:
            self._is_stopped = False
            await self._query(set_stopped, self._provider.name, None)
            _log.info("forwarding", extra={"provider": self._provider.name})

    def _make_items(self, outcomes: Sequence[Outcome]) -> list[Item]:
        items = []
        for outcome in outcomes:
            if outcome.delivery.mapping_version > CURRENT_MAPPING_VERSION:
                outcome.postpone(_NEWER_VERSION_SECONDS)
                continue
            backoff = backoff_seconds(outcome.attempts)
            for position, encoded in outcome.delivery.events.items():
                if item := self._make_item(outcome, position, encoded, backoff):
                    items.append(item)
        return items

    def _make_item(
        self, outcome: Outcome, position: int, encoded: bytes, backoff: float
    ) -> Item | None:
        """The item of one event; None for one that no request can be made of, which is dead."""
        try:
            event = Event.FromString(encoded)
            payload = self._provider.encode_event(event, outcome.delivery.mapping_version)
        except Exception:  # noqa: BLE001 - one event shall not hold up all behind it
            _log.exception("an event cannot be mapped", extra={"provider": self._provider.name})
            outcome.dead[position] = Death("cannot be mapped, see the log", "")
            return None
        moment = (event.event_timestamp.seconds, event.event_timestamp.nanos)
        return Item(outcome, position, payload, event.session_id, moment, backoff)

    async def _send_queue(self, items: Sequence[Item], deadline: float) -> None:
        limits = self._provider.max_events, self._provider.max_bytes
        for request in cut_requests(items, *limits):
            await self._send(request, deadline)

    async def _send(self, items: Sequence[Item], deadline: float) -> None:
        if time.monotonic() >= deadline or self._stop_event.is_set():
            return  # recorded as neither, they are due again at once
        payloads = [item.payload for item in items]
        answer = await self._post(self._provider.build_request(payloads))
        decision = self._provider.decide(payloads, answer)
        if decision.stop is not None:
            raise Stopped(decision.stop)
        self._note(decision, items, answer)
        for group in decision.resend:
            await self._send([items[index] for index in group], deadline)

    async def _post(self, request: Request) -> Answer | None:
        sending = asyncio.create_task(self._transport.post(request))
        stopping = asyncio.create_task(self._stop_event.wait())
        await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await asyncio.wait((sending,), timeout=_STOP_GRACE_SECONDS)
        if sending.done():
            return sending.result()
        sending.cancel()
        return None

    def _note(self, decision: Decision, items: Sequence[Item], answer: Answer | None) -> None:
        body = answer.body.decode(errors="replace") if answer else "no answer"
        said = body[:_MAX_ANSWER_CHARACTERS].replace("\0", "\ufffd")
        self._has_progressed = self._has_progressed or bool(decision.done or decision.dead)
        for index in decision.done:
            items[index].outcome.done.add(items[index].position)
        for index, reason in decision.dead.items():
            items[index].outcome.dead[items[index].position] = Death(reason, said)
        for index, seconds in decision.retry.items():
            self._note_retry(items[index], seconds, said)

    def _note_retry(self, item: Item, seconds: float, said: str) -> None:
        outcome = item.outcome
        if datetime.now(UTC) - outcome.delivery.received_at > self._max_age:
            reason = f"given up after {self._max_age}"
            outcome.dead[item.position] = Death(reason, said)
        else:
            outcome.delays[item.position] = max(seconds, item.backoff)

    async def _query(
        self, work: "Callable[Concatenate[Connection, P], T]", *args: P.args, **kwargs: P.kwargs
    ) -> T:
        def run() -> T:
            with self._connection.connected(_QUERY_SECONDS) as connection:
                return work(connection, *args, **kwargs)

        return await asyncio.to_thread(run)


def _queue_by_session(items: Sequence[Item]) -> list[list[Item]]:
    """Queues to be sent side by side: each session is in one of them, in order."""
    count = min(REQUESTS_IN_FLIGHT, 1 + len(items) // _FEW)
    queues: list[list[Item]] = [[] for _ in range(count)]
    for item in sorted(items, key=lambda item: item.timestamp):
        queues[crc32(item.session_id.encode()) % count].append(item)
    return queues


def cut_requests(items: Sequence[Item], max_events: int, max_bytes: int) -> list[list[Item]]:
    """The items in order, in as few requests as the limits allow."""
    requests: list[list[Item]] = []
    size = 0
    for item in items:
        size += len(item.payload)
        if not requests or len(requests[-1]) == max_events or size > max_bytes:
            requests.append([])
            size = len(item.payload)
        requests[-1].append(item)
    return requests


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
