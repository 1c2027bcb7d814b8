"""The gRPC edge: IngestEvents."""

import asyncio
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NoReturn

import grpc

from productgraph.v1.event_ingestion_service_pb2 import DESCRIPTOR, IngestEventsResponse
from server.caller import Caller
from server.deadline import Deadline
from server.errors import IngestError, Internal, InvalidArgument, InvalidEvents, Unavailable
from server.grpc.completions import Completions
from server.grpc.receiving import ReceivingSlots, Slot
from server.grpc.statuses import TRAILER_BYTES, describe_error
from server.ingest.ingestion import Answer
from server.ingest.preferences import STRICT_APPLIED, is_strict
from server.ingest.request_record import RequestRecord, RequestRecorder
from server.ingest.service import IngestService
from server.protocols import GRPC

_DESCRIPTOR = DESCRIPTOR.services_by_name["EventIngestionService"]
_METHOD = _DESCRIPTOR.methods_by_name["IngestEvents"].name
SERVICE = _DESCRIPTOR.full_name
_ROUTE = f"{SERVICE}/{_METHOD}"

# Each can hold a message of the largest size.
_RECEIVING_CALLS = 12
# Up to this size a message is read by the loop: handing it to the thread costs more.
_SMALL_MESSAGE_BYTES = 64 * 1024
_API_KEY = "x-pg-api-key"
_REQUEST_ID = "x-request-id"
_APPLIED = ("preference-applied", STRICT_APPLIED)

_log = logging.getLogger("productgraph.grpc")

Context = grpc.aio.ServicerContext[bytes, IngestEventsResponse]
Metadata = dict[str, str]


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

    def handler(self) -> "grpc.GenericRpcHandler[bytes, IngestEventsResponse]":
        """Return what a server needs to serve this method."""
        method = grpc.stream_unary_rpc_method_handler(
            self.ingest_events, response_serializer=IngestEventsResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {_METHOD: method})

    async def ingest_events(self, _messages: object, context: Context) -> IngestEventsResponse:
        """Store an encoded IngestEventsRequest; return once it is committed."""
        metadata = dict(context.invocation_metadata() or ())
        record = self._begin_record(context, metadata)
        status = "CANCELLED"
        try:
            caller = await self._authenticate(str(metadata.get(_API_KEY, "")), context)
            strict = "prefer" in metadata and is_strict(find_preferences(context))
            answer = await self._receive(caller, context, record, strict=strict)
            await self._completions.wait_for(answer.stored)
            if strict:
                context.set_trailing_metadata((*_trailers_of(record), _APPLIED))
            status = "OK"
            return answer.response
        except IngestError as error:
            status = error.code
            return await _abort(context, record, error)
        except grpc.aio.AbortError:  # the call was ended to make room for others
            status = Unavailable.code
            raise
        except Exception:  # noqa: BLE001 - a fault is told without details
            status = Internal.code
            _log.exception("a request failed", extra={"request_id": record.request_id})
            return await _abort(context, record, Internal())
        finally:
            record.finish(status)

    def stop(self) -> None:
        """End the thread, once no call needs it any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_record(self, context: Context, metadata: Metadata) -> RequestRecord:
        request_id, traceparent = map(metadata.get, (_REQUEST_ID, "traceparent"))
        record = self._recorder.begin(GRPC, _ROUTE, request_id, traceparent)
        context.set_trailing_metadata(_trailers_of(record))
        return record

    async def _authenticate(self, key: str, context: Context) -> Caller:
        admission = self._service.admission
        caller = admission.identify(key)
        if caller is not None:
            return caller
        deadline = self._service.find_deadline(seconds=context.time_remaining())
        # Others may wait for the same look-up: the end of this call must not cancel it.
        found = asyncio.shield(asyncio.wrap_future(admission.look_up(key)))
        try:
            return await asyncio.wait_for(found, deadline.left())
        except TimeoutError:
            raise Unavailable("not answered in time") from None

    async def _receive(
        self, caller: Caller, context: Context, record: RequestRecord, *, strict: bool
    ) -> Answer:
        """Receive a caller's message and take in what it holds."""

        async def end_call() -> None:
            with suppress(grpc.aio.AbortError):
                await _abort(context, record, Unavailable("not received in time"))

        slot = Slot(caller.key_id, end_call)
        try:
            await self._slots.take(slot)
            message = await context.read()
            slot.is_receiving = False
            record.received()
            if not isinstance(message, bytes):
                raise InvalidArgument("request: missing")
            record.authenticated(caller.project_id)
            deadline = self._service.find_deadline(seconds=context.time_remaining())
            if len(message) <= _SMALL_MESSAGE_BYTES:
                return self._service.ingest(caller, message, record, deadline, strict=strict)
            ingest = partial(self._service.ingest, strict=strict)
            reading = self._thread.submit(ingest, caller, message, record, deadline)
            return await _wait_for(reading, deadline)
        finally:
            self._slots.release(slot)


async def _wait_for(reading: "Future[Answer]", deadline: Deadline) -> Answer:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(reading), deadline.left())
    except TimeoutError:
        raise Unavailable("not answered in time") from None


def find_preferences(context: Context) -> str:
    """Return what a client asks for beyond its request, as one list of RFC 7240."""
    metadata = context.invocation_metadata() or ()
    return ",".join(str(value) for name, value in metadata if name == "prefer")


def _trailers_of(record: RequestRecord) -> tuple[tuple[str, str], ...]:
    return ((_REQUEST_ID, record.request_id),)


async def _abort(context: Context, record: RequestRecord, error: IngestError) -> NoReturn:
    trailers: tuple[tuple[str, str | bytes], ...] = (
        *_trailers_of(record),
        *_details_of(error),
    )
    await context.abort(grpc.StatusCode[error.code], str(error), trailing_metadata=trailers)


def _details_of(error: IngestError) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailer that carries an error's details, if it has any.

    https://grpc.io/docs/guides/error/#richer-error-model
    """
    status = describe_error(error, TRAILER_BYTES)
    if not status.details:
        return ()
    details = ("grpc-status-details-bin", status.SerializeToString())
    return (details, _APPLIED) if isinstance(error, InvalidEvents) else (details,)
