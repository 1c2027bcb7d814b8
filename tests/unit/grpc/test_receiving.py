"""Slots for calls that receive: who gets them, and who loses them."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from server.grpc.receiving import ReceivingSlots, Slot


class Call:
    """A call that may take a slot."""

    def __init__(self, sender: str) -> None:
        self.ended = 0
        self.slot = Slot(sender, self.end)

    async def end(self) -> None:
        """Count how often the call was ended."""
        self.ended += 1


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, for half a minute at the most."""
    asyncio.run(asyncio.wait_for(coroutine, 30))


def test_no_sender_has_more_than_half_of_the_slots() -> None:
    """A sender with its share waits while another one gets a slot at once."""

    async def check() -> None:
        slots = ReceivingSlots(4)
        greedy, other = [Call("greedy") for _ in range(3)], Call("other")
        for call in greedy[:2]:
            await slots.take(call.slot)
        waiting = asyncio.ensure_future(slots.take(greedy[2].slot))
        await asyncio.sleep(0)  # until it waits
        await slots.take(other.slot)
        assert not waiting.done()
        slots.release(greedy[0].slot)
        await waiting
        slots.release(greedy[0].slot)  # once more, which changes nothing
        assert greedy[1].ended == 0

    run(check())


def test_slots_are_granted_in_order() -> None:
    """Those who wait get the slots in the order in which they came."""

    async def check() -> None:
        slots = ReceivingSlots(2)
        calls = [Call("a") for _ in range(5)]
        done: list[int] = []

        async def take(number: int) -> None:
            await slots.take(calls[number].slot)
            done.append(number)
            slots.release(calls[number].slot)

        await slots.take(calls[0].slot)
        others = [asyncio.ensure_future(take(number)) for number in range(1, 5)]
        await asyncio.sleep(0)
        slots.release(calls[0].slot)
        await asyncio.gather(*others)
        assert done == [1, 2, 3, 4]

    run(check())


def test_who_waits_ends_the_call_that_receives_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot is taken from a call of the same sender whose message does not arrive."""
    monkeypatch.setattr("server.grpc.receiving._PATIENCE_SECONDS", 0.05)

    async def check() -> None:
        slots = ReceivingSlots(4)
        decoding, slow, foreign, late = Call("a"), Call("a"), Call("b"), Call("a")
        for call in (foreign, decoding, slow):
            await slots.take(call.slot)
        decoding.slot.is_receiving = False
        waiting = asyncio.ensure_future(slots.take(late.slot))
        while not slow.ended:
            await asyncio.sleep(0.01)
        slots.release(slow.slot)
        await waiting
        assert (decoding.ended, slow.ended, foreign.ended) == (0, 1, 0)

    run(check())


def test_who_stops_waiting_is_forgotten() -> None:
    """A call that is cancelled while it waits takes no slot from the next one."""

    async def check() -> None:
        slots = ReceivingSlots(2)
        first, cancelled, last = Call("a"), Call("a"), Call("a")

        async def take_and_release() -> None:
            try:
                await slots.take(cancelled.slot)
            finally:
                slots.release(cancelled.slot)

        await slots.take(first.slot)
        gone = asyncio.ensure_future(take_and_release())
        waiting = asyncio.ensure_future(slots.take(last.slot))
        await asyncio.sleep(0)
        gone.cancel()
        slots.release(first.slot)
        await waiting

    run(check())
