"""Errors as google.rpc.Status: a code, a text, and what a client can act on."""

from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from productgraph.v1.event_ingestion_service_pb2 import EventError, IngestEventsResponse
from server.errors import IngestError, InvalidEvents
from server.ingest.preferences import STRICT_APPLIED
from server.ingest.request_record import RequestRecord

# Clients take no trailers much over 4 KB, and in them bytes are in base64.
TRAILER_BYTES = 3072
REQUEST_ID = "x-request-id"
APPLIED = ("preference-applied", STRICT_APPLIED)
# The most that a detail takes beside its content, and an error in a list beside its own.
_DETAIL_BYTES, _ERROR_BYTES = 80, 4


def trailers_of(record: RequestRecord) -> tuple[tuple[str, str], ...]:
    """Return the metadata that every answer has."""
    return ((REQUEST_ID, record.request_id),)


async def abort_call(
    context: "grpc.aio.ServicerContext[Any, Any]", record: RequestRecord, error: IngestError
) -> NoReturn:
    """End a call with an error."""
    trailers: tuple[tuple[str, str | bytes], ...] = (
        *trailers_of(record),
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
    return (details, APPLIED) if isinstance(error, InvalidEvents) else (details,)


def describe_error(error: IngestError, max_bytes: int) -> Status:
    """Return an error with its details, cut off so that `max_bytes` hold it."""
    status = Status(code=grpc.StatusCode[error.code].value[0], message=str(error))
    if error.retry_after_seconds is not None:
        _add(status, RetryInfo(retry_delay=Duration(seconds=error.retry_after_seconds)))
    if isinstance(error, InvalidEvents):
        room = max_bytes - status.ByteSize() - _DETAIL_BYTES
        _add(status, _list_errors(error, room))
    return status


def _list_errors(refusal: InvalidEvents, room: int) -> IngestEventsResponse:
    """Return the number of the errors, and the first of them as far as there is room."""
    response = IngestEventsResponse(rejected=len(refusal.errors))
    for index, text in refusal.errors:
        error = EventError(index=index, error=text)
        room -= error.ByteSize() + _ERROR_BYTES
        if room < 0:
            break
        response.errors.append(error)
    return response


def _add(status: Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
