"""One round of a lane: what one claim took is mapped, sent, and sorted by what became of it.

The events of a session are sent in the order of their timestamps, one request after the other.
Requests are mapped one at a time, each beside the sending of the one before: something is sent soon
however many events were claimed, and memory holds few payloads.
"""

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from zlib import crc32

from server.events.event_order_pb2 import EventOrder
from server.forwarding.answers import hide_secrets
from server.forwarding.backoff import backoff_seconds
from server.forwarding.providers.provider import (
    CURRENT_MAPPING_VERSION,
    Answer,
    Decision,
    NoAnswer,
    Provider,
    Suspicion,
)
from server.forwarding.sender import Sender
from server.storage.outbox import Death, Outcome

REQUESTS_IN_FLIGHT = 4
# Fewer events are not worth a request of their own while others are in flight.
_FEW = 500
# A request goes out with what was mapped until then: on a starved processor, with few events.
_MAPPING_SECONDS = 3.0
# So many events are sent one by one to find out whether a provider takes any at all.
_SINGLE_TRIES = 5
# Kept by a newer release, while this one is still running: left to that one's forwarder.
_NEWER_VERSION_SECONDS = 60.0
_MAX_ANSWER_CHARACTERS = 500

_log = logging.getLogger("productgraph.forwarder")


class Item(NamedTuple):
    """One event on its way: its bytes, its place in the order, and where to note its outcome."""

    outcome: Outcome
    position: int
    session_id: str
    timestamp: tuple[int, int]
    backoff: float  # seconds, if it must be sent again; the same for a whole delivery

    def bury(self, death: Death) -> None:
        """Note that it will not be sent again."""
        self.outcome.dead[self.position] = death


class MappedItem(NamedTuple):
    """An item with its payload for the provider."""

    item: Item
    payload: bytes


class Window(NamedTuple):
    """Until when a round sends, on the monotonic clock.

    No request begins after `end`, except the first one: that may begin until `latest`.
    """

    end: float
    latest: float


class RequestQueue:
    """The items of some sessions in their order, cut into requests as they are asked for."""

    def __init__(self, items: Sequence[Item], provider: Provider, max_events: int) -> None:
        self._items = deque(items)
        self._provider = provider
        self._max_events = max_events
        # Mapped, and too large for the request before.
        self._waiting: MappedItem | None = None

    def take_request(self) -> list[MappedItem]:
        """Map the next request; empty at the end. One thread at a time."""
        request: list[MappedItem] = []
        size, stop_at = 0, time.monotonic() + _MAPPING_SECONDS
        while len(request) < self._max_events:
            if (mapped := self._take_mapped()) is None:
                break
            size += len(mapped.payload)
            if request and size > self._provider.max_bytes:
                self._waiting = mapped
                break
            request.append(mapped)
            if time.monotonic() >= stop_at:
                break
        return request

    def _take_mapped(self) -> MappedItem | None:
        mapped, self._waiting = self._waiting, None
        while mapped is None and self._items:
            mapped = _map_item(self._items.popleft(), self._provider)
        return mapped


def _map_item(item: Item, provider: Provider) -> MappedItem | None:
    """Map an event; bury one that cannot be mapped, and return None."""
    delivery = item.outcome.delivery
    try:
        encoded = delivery.events[item.position]
        return MappedItem(item, provider.encode_event(encoded, delivery.mapping_version))
    except Exception:  # noqa: BLE001 - one event must not hold up all those behind it
        _log.exception("an event cannot be mapped", extra={"provider": provider.name})
        item.bury(Death("cannot be mapped, see the log", ""))
        return None


class _Suspect(NamedTuple):
    """A single event that a suspicion has led to."""

    item: Item
    suspicion: Suspicion
    answer: str


class Round:
    """Sends the events of some deliveries, and notes in their outcomes what became of them."""

    def __init__(
        self, sender: Sender, outcomes: Sequence[Outcome], window: Window, max_age: timedelta
    ) -> None:
        self._sender = sender
        self._outcomes = outcomes
        self._window = window
        self._max_age = max_age
        self._suspects: list[_Suspect] = []
        self._singles = 0
        # A probe of a stopped lane buries nothing: the provider may not be itself.
        self._is_probing = False
        # At most `_SINGLE_TRIES` events are tried in a round, whatever is sent side by side.
        self._searching = asyncio.Lock()
        self._mapping = asyncio.Lock()
        self.has_sent = False
        self.has_accepted = False
        # Whether the provider has settled anything, be it by refusing it.
        self.has_progressed = False
        # Whether something is left for which there was no time.
        self.is_cut_short = False
        self.stop_reason: str | None = None
        # How many events were given up for reasons that no answer has named.
        self.given_up: Counter[str] = Counter()

    async def send(self, max_events: int) -> None:
        """Send everything that there is time for, in requests of at most `max_events`."""
        items = await asyncio.to_thread(self._read_items)
        queues = _divide_by_session(items)
        ends = await asyncio.gather(
            *(self._send_queue(queue, max_events) for queue in queues), return_exceptions=True
        )
        self._settle_suspects()
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def probe(self, tried: "deque[tuple[int, int]]") -> None:
        """Send a single event, one that is not among those `tried`, if there is one."""
        items = await asyncio.to_thread(self._read_items)
        if not items:
            return
        others = [item for item in items if _identify(item) not in tried]
        item = random.choice(others or items)  # noqa: S311 - any will do
        tried.append(_identify(item))
        request = await asyncio.to_thread(
            RequestQueue([item], self._sender.provider, max_events=1).take_request
        )
        self._is_probing = True
        if request:
            await self._send_request(request)
        if not self.has_progressed:
            for outcome in self._outcomes:
                outcome.delays.clear()  # the delivery stays whole, and is due again at once

    def _read_items(self) -> list[Item]:
        items = []
        for outcome in self._outcomes:
            if outcome.delivery.mapping_version > CURRENT_MAPPING_VERSION:
                outcome.postpone(_NEWER_VERSION_SECONDS)
                continue
            backoff = backoff_seconds(outcome.attempts)
            for position, encoded in outcome.delivery.events.items():
                if item := _read_item(outcome, position, encoded, backoff):
                    items.append(item)
        return items

    async def _send_queue(self, items: Sequence[Item], max_events: int) -> None:
        queue = RequestQueue(items, self._sender.provider, max_events)
        mapping = asyncio.create_task(self._map_request(queue))
        try:
            while request := await mapping:
                mapping = asyncio.create_task(self._map_request(queue))
                await self._send_request(request)
                if not self._may_send():
                    break
        finally:
            await asyncio.wait([mapping])

    async def _map_request(self, queue: RequestQueue) -> list[MappedItem]:
        """Map one request at a time: side by side, all would be ready at the same late moment."""
        async with self._mapping:
            return await asyncio.to_thread(queue.take_request)

    def _may_send(self) -> bool:
        if self._sender.stop.is_set() or self.stop_reason is not None:
            return False
        limit = self._window.end if self.has_sent else self._window.latest
        if time.monotonic() < limit:
            return True
        self.is_cut_short = True
        return False

    async def _send_request(self, request: Sequence[MappedItem]) -> None:
        if not self._may_send():
            return  # what is noted nowhere is due again at once
        self.has_sent = True
        self._singles += len(request) == 1
        decision, answer = await self._sender.send([payload for _, payload in request])
        self._note(decision, [item for item, _ in request], self._quote(answer))
        if decision.stop is not None:
            self.stop_reason = decision.stop
        elif decision.suspicion is not None:
            await self._find_culprit(request, decision.suspicion, self._quote(answer))
        for group in decision.resend:
            await self._send_request([request[index] for index in group])

    async def _find_culprit(
        self, request: Sequence[MappedItem], suspicion: Suspicion, answer: str
    ) -> None:
        """Find the event that caused an answer: by halves, if the provider takes others at all."""
        if len(request) == 1:
            self._suspects.append(_Suspect(request[0].item, suspicion, answer))
            rest: list[MappedItem] = []
        else:
            async with self._searching:
                rest = await self._try_singles(list(request))
        if self.has_accepted:
            middle = (len(rest) + 1) // 2
            for half in (rest[:middle], rest[middle:]):
                if half:
                    await self._send_request(half)
        elif self.stop_reason is None and suspicion.is_refusal and self._singles >= _SINGLE_TRIES:
            self.stop_reason = f"the provider takes nothing: {suspicion.reason}"
        else:
            for item, _ in rest:
                self._postpone(item, 0.0, suspicion.reason, answer)

    async def _try_singles(self, request: list[MappedItem]) -> list[MappedItem]:
        """Send single events, drawn at random, until one is accepted; return those not sent."""
        random.shuffle(request)
        while request and not self.has_accepted and self._singles < _SINGLE_TRIES:
            if not self._may_send():
                break
            await self._send_request([request.pop()])
        return sorted(request, key=lambda mapped: mapped.item.timestamp)

    def _settle_suspects(self) -> None:
        """Bury the events that were refused, if the provider has accepted others in this round."""
        for item, suspicion, answer in self._suspects:
            if suspicion.is_refusal and self.has_accepted:
                self._give_up(item, suspicion.reason, answer)
            else:
                self._postpone(item, 0.0, suspicion.reason, answer)
        refused = [suspect for suspect in self._suspects if suspect.suspicion.is_refusal]
        if refused and not self.has_accepted and self.stop_reason is None:
            reason = refused[0].suspicion.reason
            self.stop_reason = f"the provider takes nothing: {reason}"

    def _note(self, decision: Decision, items: Sequence[Item], answer: str) -> None:
        self.has_accepted = self.has_accepted or bool(decision.done)
        self.has_progressed = self.has_progressed or bool(decision.done or decision.dead)
        for index in decision.done:
            items[index].outcome.done.add(items[index].position)
        if not self._is_probing:
            for index, reason in decision.dead.items():
                items[index].bury(Death(reason, answer))
        for index, seconds in decision.retry.items():
            reason = decision.retry_reasons.get(index, "")
            self._postpone(items[index], seconds, reason, answer)

    def _postpone(self, item: Item, seconds: float, reason: str, answer: str) -> None:
        outcome = item.outcome
        if datetime.now(UTC) - outcome.delivery.queued_at > self._max_age:
            self._give_up(item, explain_age(self._max_age, reason), answer)
        else:
            outcome.delays[item.position] = max(seconds, item.backoff)

    def _give_up(self, item: Item, reason: str, answer: str) -> None:
        item.bury(Death(reason, answer))
        self.given_up[reason] += 1

    def _quote(self, answer: Answer | NoAnswer) -> str:
        if isinstance(answer, NoAnswer):
            return "no answer"
        body = answer.body[: 4 * _MAX_ANSWER_CHARACTERS].decode(errors="replace")
        shown = hide_secrets(body, self._sender.provider.secrets)
        return shown[:_MAX_ANSWER_CHARACTERS].replace("\0", "\ufffd")


def explain_age(max_age: timedelta, reason: str) -> str:
    """Say why an event is given up that has waited for too long."""
    return f"given up after {max_age}" + (f": {reason}" if reason else "")


def _identify(item: Item) -> tuple[int, int]:
    return item.outcome.delivery.payload_id, item.position


def _read_item(outcome: Outcome, position: int, encoded: bytes, backoff: float) -> Item | None:
    try:
        order = EventOrder.FromString(encoded)
    except Exception:  # noqa: BLE001 - one event must not hold up all those behind it
        _log.exception("an event cannot be read")
        outcome.dead[position] = Death("cannot be read, see the log", "")
        return None
    moment = (order.event_timestamp.seconds, order.event_timestamp.nanos)
    return Item(outcome, position, order.session_id, moment, backoff)


def _divide_by_session(items: Sequence[Item]) -> list[list[Item]]:
    """Divide items into queues that are sent side by side: each session is in one, in order."""
    count = min(REQUESTS_IN_FLIGHT, 1 + len(items) // _FEW)
    queues: list[list[Item]] = [[] for _ in range(count)]
    for item in sorted(items, key=lambda item: item.timestamp):
        queues[crc32(item.session_id.encode()) % count].append(item)
    return queues
