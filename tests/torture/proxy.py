"""A TCP proxy on the loopback interface that can be as bad as networks are."""

import asyncio
import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Self

from tests.support.patience import PATIENCE
from tests.support.services import wait_until
from tests.torture.wire import FrontendMessages

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_PIECE_BYTES = 1 << 16
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Weather:
    """What happens to traffic: a delay of each piece, in seconds at most; small pieces; a stall."""

    delay: float = 0.0
    piece_bytes: int = _PIECE_BYTES
    stalled: bool = False


class CommitCut(Enum):
    """When a connection ends that is about to commit."""

    BEFORE = "the COMMIT is not passed on"
    DURING = "it is passed on, and the connection ends at once"
    AFTER = "it is passed on, and the connection ends instead of the answer"


def to_port(port: int) -> Callable[[], Awaitable[Streams]]:
    """Connect to a port of this machine."""
    return lambda: asyncio.open_connection("127.0.0.1", port)


def to_socket(path: Path) -> Callable[[], Awaitable[Streams]]:
    """Connect to a Unix socket."""
    return lambda: asyncio.open_unix_connection(path)


class _Passage:
    """A client's connection, and the one to the server that it leads to."""

    def __init__(
        self,
        client: asyncio.StreamWriter,
        server: asyncio.StreamWriter,
        messages: FrontendMessages | None,
    ) -> None:
        self.client = client
        self.server = server
        self.ends_at_answer = self.ends_by_reset = False
        self._messages = messages

    def read(self, data: bytes) -> Iterable[bytes]:
        """Return what to pass on of the client's bytes, message by message if they are known."""
        return [data] if self._messages is None else self._messages.feed(data)

    def is_commit(self, message: bytes) -> bool:
        """Return whether it commits rows."""
        return self._messages is not None and self._messages.commits_rows(message)

    def end(self, *, reset: bool) -> None:
        """End both connections."""
        for writer in (self.client, self.server):
            connection = writer.get_extra_info("socket")
            if reset and connection.family != socket.AF_UNIX and connection.fileno() >= 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


class Proxy:
    """Passes connections on to a server; a context manager, controlled from other threads."""

    def __init__(
        self, connect: Callable[[], Awaitable[Streams]], *, seed: str, is_database: bool = False
    ) -> None:
        self._connect = connect
        self._is_database = is_database
        self._random = random.Random(seed)
        self._weather = Weather()
        self._flowing = asyncio.Event()
        self._passages: set[_Passage] = set()
        self._commit_cuts: deque[CommitCut] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0  # connections that were ended

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @contextmanager
    def weather(self, weather: Weather) -> Iterator[None]:
        """Give connections this weather as long as the context lasts."""
        self._set_weather(weather)
        try:
            yield
        finally:
            self._set_weather(Weather())

    def cut(self, *, reset: bool = False) -> None:
        """End all connections, in order or by a reset."""

        async def cut() -> None:
            for passage in tuple(self._passages):
                self._end(passage, reset)

        asyncio.run_coroutine_threadsafe(cut(), self._loop).result()

    def cut_commit(self, moment: CommitCut) -> None:
        """End the next connection that commits what it has copied. Return when that is done."""
        cuts = self.cuts
        self._commit_cuts.append(moment)
        wait_until(lambda: self.cuts > cuts, 15.0 * PATIENCE)

    def _set_weather(self, weather: Weather) -> None:
        async def change() -> None:
            self._weather = weather
            (self._flowing.clear if weather.stalled else self._flowing.set)()

        asyncio.run_coroutine_threadsafe(change(), self._loop).result()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._flowing.set()
        server = self._loop.run_until_complete(
            asyncio.start_server(self._pass, sock=self._listener)
        )
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        passage = _Passage(writer, back, FrontendMessages() if self._is_database else None)
        self._passages.add(passage)
        pumps = [
            asyncio.create_task(self._pump_requests(reader, passage)),
            asyncio.create_task(self._pump_answers(there, passage)),
        ]
        try:
            # Whichever end leaves, the other one is told by the end of its connection.
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._passages.discard(passage)
            passage.end(reset=False)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump_requests(self, reader: asyncio.StreamReader, passage: "_Passage") -> None:
        while data := await reader.read(_PIECE_BYTES):
            for message in passage.read(data):
                if self._commit_cuts and passage.is_commit(message):
                    await self._cut_commit(self._commit_cuts.popleft(), message, passage)
                else:
                    await self._send(passage.server, message)

    async def _pump_answers(self, reader: asyncio.StreamReader, passage: "_Passage") -> None:
        while data := await reader.read(_PIECE_BYTES):
            if passage.ends_at_answer:
                self._end(passage, passage.ends_by_reset)
            await self._send(passage.client, data)

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        position = 0
        while position < len(data):
            weather = self._weather
            size = self._random.randint(1, weather.piece_bytes)
            if weather.delay:
                await asyncio.sleep(self._random.uniform(0, weather.delay))
            await self._flowing.wait()
            writer.write(data[position : position + size])
            await writer.drain()
            position += size

    async def _cut_commit(self, moment: CommitCut, message: bytes, passage: "_Passage") -> None:
        reset = self._random.random() < 0.5
        if moment is not CommitCut.BEFORE:
            passage.ends_at_answer = moment is CommitCut.AFTER
            passage.ends_by_reset = reset
            await self._send(passage.server, message)
        if moment is not CommitCut.AFTER:
            self._end(passage, reset)

    def _end(self, passage: "_Passage", reset: bool) -> None:
        passage.end(reset=reset)
        self.cuts += 1
