"""Messages on their way: how many may be received at once, and from whom.

gRPC keeps what has arrived of a message until it is complete, up to the largest, once somebody has
asked for it. So a call asks only while it has a slot, and keeps that until its message is decoded,
if the message is large.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

# A call that waits for a slot may take that of one which has had it this long.
_PATIENCE_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class Slot:
    """The right of one call to receive a message.

    It has it until its message is decoded; `is_receiving` says whether that is still on its way.
    `end_call` ends the call with an error. The task that reads must not be cancelled instead: gRPC
    would go on writing to memory that the cancellation has freed.
    """

    sender: Hashable
    end_call: Callable[[], Awaitable[object]]
    taken_at: float = 0.0
    is_receiving: bool = True


class ReceivingSlots:
    """Slots for the calls of one event loop; no sender has more than half of them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._share = max(1, count // 2)
        self._taken: dict[Slot, None] = {}  # in the order in which they were taken
        self._taken_by: Counter[Hashable] = Counter()
        self._waiting: dict[Slot, asyncio.Future[None]] = {}

    async def take(self, slot: Slot) -> None:
        """Wait until there is room for a slot, and take it; `release` it in any case."""
        if self._has_room(slot.sender):  # those who wait have none: `release` lets them in
            self._add(slot)
            return
        granted = self._waiting[slot] = asyncio.get_running_loop().create_future()
        try:
            while not granted.done():
                await asyncio.wait([granted], timeout=_PATIENCE_SECONDS)
                if not granted.done():
                    await self._take_away(slot.sender)
        finally:
            self._waiting.pop(slot, None)

    def release(self, slot: Slot) -> None:
        """Give a slot back, if it was taken."""
        if slot in self._taken:
            del self._taken[slot]
            self._taken_by[slot.sender] -= 1
            if not self._taken_by[slot.sender]:
                del self._taken_by[slot.sender]
            if self._waiting:
                self._grant()

    def _has_room(self, sender: Hashable) -> bool:
        return len(self._taken) < self._count and self._taken_by[sender] < self._share

    def _add(self, slot: Slot) -> None:
        slot.taken_at = time.monotonic()
        self._taken[slot] = None
        self._taken_by[slot.sender] += 1

    def _grant(self) -> None:
        """Give free slots to those who wait, in their order, but for senders with their share."""
        for slot, granted in tuple(self._waiting.items()):
            if len(self._taken) >= self._count:
                return
            if self._has_room(slot.sender):
                del self._waiting[slot]
                self._add(slot)
                granted.set_result(None)

    async def _take_away(self, sender: Hashable) -> None:
        """End the call that has received longest, of those whose end makes room for a sender."""
        is_at_share = self._taken_by[sender] >= self._share
        since = time.monotonic() - _PATIENCE_SECONDS
        for slot in self._taken:
            is_in_the_way = slot.sender == sender or not is_at_share
            if is_in_the_way and slot.is_receiving and slot.taken_at <= since:
                slot.is_receiving = False
                await slot.end_call()
                return
