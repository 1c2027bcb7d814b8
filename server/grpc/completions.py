"""Waiting in the event loop for what other threads complete."""

import asyncio
from collections import deque
from concurrent.futures import Future
from functools import partial

from server.wakeups import wake


class Completions:
    """Waits for futures that are completed in groups: the loop is woken once for each group.

    `asyncio.wrap_future` would wake it for each future. For one event loop.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._completed: deque[asyncio.Future[None]] = deque()

    async def wait_for(self, future: "Future[None]") -> None:
        """Return once a future is done; raise what it failed with. Cancelling leaves it alone."""
        if not future.done():
            self._loop = loop = asyncio.get_running_loop()
            waiting: asyncio.Future[None] = loop.create_future()
            future.add_done_callback(partial(self._complete, waiting))
            await waiting
        future.result()

    def _complete(self, waiting: "asyncio.Future[None]", _future: "Future[None]") -> None:
        """Take note that somebody need not wait any more; from any thread."""
        self._completed.append(waiting)
        wake(self._wake)

    def _wake(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        while self._completed:
            waiting = self._completed.popleft()
            if not waiting.done():
                waiting.set_result(None)
