"""One HTTP request to a provider, bounded in time and in what is read of the answer."""

import asyncio

import httpx

from server.forwarding.providers.provider import MAX_ANSWER_BYTES, Answer, NoAnswer, Request

# For the request as a whole: a server that drips a byte a second keeps every smaller timeout. None
# is shorter for connecting: a starved process needs long for that too, and would never get through.
TOTAL_SECONDS = 20.0


class Transport:
    """Sends requests over reused connections; follows no redirects and uses no proxies."""

    def __init__(self, connections: int) -> None:
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(TOTAL_SECONDS),
            trust_env=False,
            limits=httpx.Limits(max_connections=connections),
            # A compressed answer could be far larger than it looks.
            headers={"Accept-Encoding": "identity", "User-Agent": "productgraph"},
        )

    async def send(self, request: Request) -> Answer | NoAnswer:
        """Return the answer to a request, or why there is none, or not all of it, in time."""
        try:
            async with asyncio.timeout(TOTAL_SECONDS):
                return await self._send(request)
        except (httpx.HTTPError, TimeoutError) as error:
            return NoAnswer(type(error).__name__)

    async def _send(self, request: Request) -> Answer:
        body = bytearray()
        async with self._client.stream(
            request.method, request.url, content=request.body, headers=request.headers
        ) as response:
            async for part in response.aiter_raw():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    break
        return Answer(response.status_code, response.headers, bytes(body[:MAX_ANSWER_BYTES]))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
