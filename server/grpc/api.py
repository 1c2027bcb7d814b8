"""The gRPC edge: IngestEvents and StreamEvents."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import grpc

from productgraph.v1.event_ingestion_service_pb2 import (
    DESCRIPTOR,
    IngestEventsResponse,
    StreamEventsResponse,
)
from server.caller import Caller
from server.deadline import Deadline
from server.errors import IngestError, Internal, InvalidArgument, Unavailable
from server.grpc.completions import Completions
from server.grpc.receiving import ReceivingSlots, Slot
from server.grpc.statuses import APPLIED, REQUEST_ID, abort_call, trailers_of
from server.grpc.streaming import EventStreams
from server.ingest.ingestion import Answer
from server.ingest.preferences import is_strict
from server.ingest.request_record import RequestRecord, RequestRecorder
from server.ingest.service import IngestService
from server.protocols import GRPC

_DESCRIPTOR = DESCRIPTOR.services_by_name["EventIngestionService"]
_METHOD = _DESCRIPTOR.methods_by_name["IngestEvents"].name
SERVICE = _DESCRIPTOR.full_name
_STREAM = _DESCRIPTOR.methods_by_name["StreamEvents"].name

# Each can hold a message of the largest size.
_RECEIVING_CALLS = 12
# Up to this size a message is read by the loop: handing it to the thread costs more.
_SMALL_MESSAGE_BYTES = 64 * 1024
_API_KEY = "x-pg-api-key"

_log = logging.getLogger("productgraph.grpc")

_NOT_RECEIVED = Unavailable("not received in time")

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = dict[str, str]
T = TypeVar("T")


class IngestServicer:
    """Answers IngestEvents. Takes the request's bytes, so that each event is parsed by itself.

    To gRPC a request is a stream of one message: so the key is known before that is received, and
    who has none cannot make the service keep anything. Large messages are read in a thread.
    """

    def __init__(self, service: IngestService, recorder: RequestRecorder) -> None:
        self._service = service
        self._recorder = recorder
        self._slots = ReceivingSlots(_RECEIVING_CALLS)
        self._thread = ThreadPoolExecutor(1, "grpc-large")
        self._completions = Completions()
        self.streams = EventStreams(self._completions)

    def handler(self) -> "grpc.GenericRpcHandler[bytes, IngestEventsResponse]":
        """Return what a server needs to serve this method."""
        method = grpc.stream_unary_rpc_method_handler(
            self.ingest_events, response_serializer=IngestEventsResponse.SerializeToString
        )
        stream = grpc.stream_stream_rpc_method_handler(
            self.stream_events, response_serializer=StreamEventsResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {_METHOD: method, _STREAM: stream})

    async def ingest_events(self, _messages: object, context: Context) -> IngestEventsResponse:
        """Store an encoded IngestEventsRequest; return once it is committed."""
        metadata = dict(context.invocation_metadata() or ())
        record = self._begin_record(context, metadata, _METHOD)
        status = "CANCELLED"
        try:
            caller = await self._authenticate(str(metadata.get(_API_KEY, "")), context)
            record.identified(caller)
            strict = _wants_strict(metadata, context)
            answer = await self._receive(caller, context, record, strict=strict)
            await self._completions.wait_for(answer.stored)
            if strict:
                context.set_trailing_metadata((*trailers_of(record), APPLIED))
            status = "OK"
            return answer.response
        except IngestError as error:
            status = error.code
            record.refused(error)
            return await abort_call(context, record, error)
        except grpc.aio.AbortError:  # the call was ended to make room for others
            status = Unavailable.code
            record.refused(_NOT_RECEIVED)
            raise
        except Exception:  # noqa: BLE001 - the client gets no details of a fault
            status = Internal.code
            _log.exception("a request failed", extra={"request_id": record.request_id})
            return await abort_call(context, record, Internal())
        finally:
            record.finish(status)

    async def stream_events(self, _messages: object, context: Context) -> None:
        """Answer each encoded StreamEventsRequest once it is committed."""
        metadata = dict(context.invocation_metadata() or ())
        record = self._begin_record(context, metadata, _STREAM)
        strict = _wants_strict(metadata, context)
        key = str(metadata.get(_API_KEY, ""))

        async def take(message: bytes, part: RequestRecord) -> Answer:
            caller = await self._authenticate(key, context)
            return await self._ingest(caller, message, part, context, strict=strict)

        try:
            caller = await self._authenticate(key, context)
        except IngestError as error:
            record.refused(error)
            record.finish(error.code)
            await abort_call(context, record, error)
        applied = (APPLIED,) if strict else ()
        await context.send_initial_metadata((*trailers_of(record), *applied))
        await self.streams.serve(caller, context, record, take)

    def stop(self) -> None:
        """End the thread, once no call needs it any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_record(self, context: Context, metadata: Metadata, method: str) -> RequestRecord:
        request_id, traceparent = map(metadata.get, (REQUEST_ID, "traceparent"))
        record = self._recorder.begin(GRPC, f"{SERVICE}/{method}", request_id, traceparent)
        context.set_trailing_metadata(trailers_of(record))
        return record

    async def _authenticate(self, key: str, context: Context) -> Caller:
        admission = self._service.admission
        caller = admission.identify(key)
        if caller is not None:
            return caller
        deadline = self._service.find_deadline(seconds=context.time_remaining())
        # Others may wait for the same look-up: the end of this call must not cancel it.
        found = asyncio.shield(asyncio.wrap_future(admission.look_up(key)))
        return await _wait_for(found, deadline)

    async def _receive(
        self, caller: Caller, context: Context, record: RequestRecord, *, strict: bool
    ) -> Answer:
        """Receive a caller's message and take in what it holds."""

        async def end_call() -> None:
            with suppress(grpc.aio.AbortError):
                await abort_call(context, record, _NOT_RECEIVED)

        slot = Slot(caller.key_id, end_call)
        try:
            await self._slots.take(slot)
            message = await context.read()
            slot.is_receiving = False
            record.received()
            if not isinstance(message, bytes):
                raise InvalidArgument("request: missing")
            return await self._ingest(caller, message, record, context, strict=strict)
        finally:
            self._slots.release(slot)

    async def _ingest(
        self,
        caller: Caller,
        message: bytes,
        record: RequestRecord,
        context: Context,
        *,
        strict: bool,
    ) -> Answer:
        record.authenticated(caller)
        deadline = self._service.find_deadline(seconds=context.time_remaining())
        ingest = partial(self._service.ingest, strict=strict)
        if len(message) <= _SMALL_MESSAGE_BYTES:
            return ingest(caller, message, record, deadline)
        reading = self._thread.submit(ingest, caller, message, record, deadline)
        return await _wait_for(asyncio.wrap_future(reading), deadline)


async def _wait_for(future: "asyncio.Future[T]", deadline: Deadline) -> T:
    """Return what a future brings. Raises Unavailable at the deadline."""
    try:
        return await asyncio.wait_for(future, deadline.left())
    except TimeoutError:
        raise Unavailable("not answered in time") from None


def _wants_strict(metadata: Metadata, context: Context) -> bool:
    return "prefer" in metadata and is_strict(find_preferences(context))


def find_preferences(context: Context) -> str:
    """Return what a client asks for beyond its request, as one list of RFC 7240."""
    metadata = context.invocation_metadata() or ()
    return ",".join(str(value) for name, value in metadata if name == "prefer")
