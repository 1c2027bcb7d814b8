"""StreamEvents: many messages in one call, each a request of its own, answered in their order."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from productgraph.v1.event_ingestion_service_pb2 import StreamEventsResponse
from server.caller import Caller
from server.errors import IngestError, Internal, Unauthenticated, Unavailable
from server.grpc.completions import Completions
from server.grpc.receiving import ReceivingSlots, Slot
from server.grpc.statuses import abort_call, describe_error
from server.ingest.ingestion import Answer
from server.ingest.request_record import RequestRecord

# A stream reads no further while this many of its messages, or of their bytes, are unanswered.
_MESSAGES, _BYTES = 128, 4 << 20
# A stream ends by itself after this long. Connections must outlive it: see server.py.
STREAM_SECONDS = 240.0
# A silent stream holds the right to receive one message of the largest size. If more are open than
# this, those that have been silent longest end.
_RECEIVING_STREAMS = 32
# Between the last answer of a stream and its end. When the server stops, a connection ends with its
# last call, and a reset would destroy what the client has not read by then.
_LAST_READ_SECONDS = 0.5
# A status in a message is no trailer, and may have all errors of a batch.
_STATUS_BYTES = 4 << 20

_OPEN_ANOTHER = "the stream ends: open another, and send there what was not answered"

_log = logging.getLogger("productgraph.grpc")

Context = grpc.aio.ServicerContext[Any, Any]
# Takes in a message of a call: raises IngestError, or returns the answer once that is committed.
Take = Callable[[bytes, RequestRecord], Awaitable[Answer]]


class EventStreams:
    """The streams of one event loop, and what they share."""

    def __init__(self, completions: Completions) -> None:
        self.completions = completions
        self.slots = ReceivingSlots(_RECEIVING_STREAMS)
        self._open: set[EventStream] = set()
        self._is_stopping = False

    def stop(self) -> None:
        """Let each stream read no further, answer what it has taken, and end."""
        self._is_stopping = True
        for stream in tuple(self._open):
            stream.stop()

    async def serve(
        self, caller: Caller, context: Context, record: RequestRecord, take: Take
    ) -> None:
        """Read and answer the messages of a caller's stream, until it ends."""
        stream = EventStream(self, caller, context, record, take)
        if self._is_stopping:
            stream.stop()
        ending = asyncio.get_running_loop().call_later(STREAM_SECONDS, stream.stop)
        self._open.add(stream)
        try:
            await stream.run()
        finally:
            self._open.discard(stream)
            ending.cancel()


@dataclass(slots=True)
class _Message:
    """A message that was taken, and must be answered."""

    record: RequestRecord
    size: int
    answer: Answer | None = None
    error: IngestError | None = None

    async def respond(self, completions: Completions) -> StreamEventsResponse:
        """Return what became of it, once that is certain."""
        try:
            if self.error is not None:
                raise self.error
            assert self.answer is not None
            await completions.wait_for(self.answer.stored)
        except IngestError as error:
            self.record.refused(error)
            self.record.finish(error.code)
            return StreamEventsResponse(status=describe_error(error, _STATUS_BYTES))
        except Exception:  # noqa: BLE001 - the client gets no details of a fault
            _log.exception("a request failed", extra={"request_id": self.record.request_id})
            self.record.finish(Internal.code)
            return StreamEventsResponse(status=describe_error(Internal(), _STATUS_BYTES))
        self.record.finish("OK")
        return StreamEventsResponse(response=self.answer.response)


class EventStream:
    """One stream: a task reads and takes its messages, and `run` answers them."""

    def __init__(
        self,
        streams: EventStreams,
        caller: Caller,
        context: Context,
        record: RequestRecord,
        take: Take,
    ) -> None:
        self._context = context
        self._record = record
        self._take = take
        self._slots = streams.slots
        self._completions = streams.completions
        self._sender = caller.key_id
        self._unanswered: deque[_Message] = deque()
        self._number = 0
        self._bytes = 0
        self._is_reading = True  # or may begin to
        self._is_queued = False  # for a slot
        self._is_taking = False
        self._is_complete = False  # the client has sent all that it had to
        self._is_over = False
        self._revoked: Unauthenticated | None = None
        self._changed = asyncio.Event()  # there is something to answer, or nothing any more
        self._has_room = asyncio.Event()

    def stop(self) -> None:
        """Read no further."""
        self._is_reading = False
        self._changed.set()
        self._has_room.set()

    async def run(self) -> None:
        """Answer messages until the client has sent all, or the stream was stopped."""
        self._reading = asyncio.create_task(self._read())
        try:
            await self._answer_all()
        finally:
            self._is_over = True
            self.stop()
            if self._is_queued:
                # Not while it reads (see Slot): then it ends with the call.
                self._reading.cancel()
            for message in self._unanswered:
                message.record.finish("CANCELLED")
        if self._revoked is not None:
            await abort_call(self._context, self._record, self._revoked)
        if not self._is_complete:
            await asyncio.sleep(_LAST_READ_SECONDS)
            await abort_call(self._context, self._record, Unavailable(_OPEN_ANOTHER))

    async def _answer_all(self) -> None:
        while self._unanswered or self._is_reading or self._is_taking:
            if not self._unanswered:
                self._changed.clear()
                await self._changed.wait()
                continue
            message = self._unanswered[0]
            response = await message.respond(self._completions)
            self._unanswered.popleft()
            self._bytes -= message.size
            self._has_room.set()
            await self._context.write(response)

    async def _read(self) -> None:
        try:
            while self._is_reading:
                while self._is_reading and self._is_full():
                    self._has_room.clear()
                    await self._has_room.wait()
                if self._is_reading:
                    await self._read_one()
        except Exception:  # noqa: BLE001 - a call that is over cannot be read
            if not self._is_over:
                _log.exception("a stream cannot be read")
        finally:
            self.stop()

    def _is_full(self) -> bool:
        return len(self._unanswered) >= _MESSAGES or self._bytes >= _BYTES

    async def _read_one(self) -> None:
        async def make_room() -> None:
            self.stop()

        slot = Slot(self._sender, make_room)
        try:
            self._is_queued = True
            await self._slots.take(slot)
            self._is_queued = False
            content = await self._context.read()
            slot.is_receiving = False
            if isinstance(content, bytes) and not self._is_over:
                self._is_taking = True
                await self._take_one(content)
            elif not self._is_over:
                self._is_complete = True
                self.stop()
        finally:
            self._is_taking = False
            self._changed.set()
            self._slots.release(slot)

    async def _take_one(self, content: bytes) -> None:
        self._number += 1
        message = _Message(self._record.begin_part(self._number), len(content))
        try:
            message.answer = await self._take(content, message.record)
        except Unauthenticated as error:
            message.error = self._revoked = error
            self._is_reading = False
        except IngestError as error:
            message.error = error
        except Exception:  # noqa: BLE001 - the client gets no details of a fault
            _log.exception("a request failed", extra={"request_id": message.record.request_id})
            message.error = Internal()
        if self._is_over:  # the client has gone meanwhile
            message.record.finish("CANCELLED")
        self._unanswered.append(message)
        self._bytes += message.size
