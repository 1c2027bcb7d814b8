"""Queries of the forwarder's event loop, each in a thread while the others go on."""

import asyncio
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from server.storage.connection import Connection, GuardedConnection

P = ParamSpec("P")
T = TypeVar("T")

_QUERY_SECONDS = 20.0


class Queries:
    """Runs functions on one connection, one at a time."""

    def __init__(self, connection: GuardedConnection) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    async def run(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return what `work` returns; raise Unavailable if the database does not answer."""

        def query() -> T:
            with self._connection.connected(_QUERY_SECONDS) as connection:
                return work(connection, *args, **kwargs)

        async with self._turn:
            return await asyncio.to_thread(query)
