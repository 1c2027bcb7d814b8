"""Requests of one lane on their way to its provider."""

import asyncio
from collections.abc import Sequence

from server.forwarding.http_client import Transport
from server.forwarding.lane_health import LaneHealth
from server.forwarding.providers.provider import Answer, Decision, NoAnswer, Provider, Request

# How long to wait for an answer once the forwarder is to stop.
_STOP_GRACE_SECONDS = 5.0


class Sender:
    """Sends payloads to a provider, and decides what the answer means."""

    def __init__(
        self, provider: Provider, transport: Transport, health: LaneHealth, stop: asyncio.Event
    ) -> None:
        self.provider = provider
        # Set when the forwarder is to stop.
        self.stop = stop
        self._transport = transport
        self._health = health
        self._noting = asyncio.Lock()

    async def send(self, payloads: Sequence[bytes]) -> tuple[Decision, Answer | NoAnswer]:
        """Send one request; return what becomes of its events, and what was answered."""
        request = self.provider.build_request(payloads)
        answer = await send_before_stop(self._transport, request, self.stop)
        known = None if isinstance(answer, NoAnswer) else answer
        decision = self.provider.decide(payloads, known)
        async with self._noting:
            await asyncio.to_thread(self._health.note_request, payloads, decision, answer)
        return decision, answer


async def send_before_stop(
    transport: Transport, request: Request, stop: asyncio.Event
) -> Answer | NoAnswer:
    """Return the answer to a request, or none if it does not come soon after `stop` is set."""
    sending = asyncio.create_task(transport.send(request))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    await asyncio.wait((sending,), timeout=_STOP_GRACE_SECONDS)
    if sending.done():
        return sending.result()
    sending.cancel()
    return NoAnswer("the forwarder stops")
