"""The gRPC edge: IngestEvents, the standard health service, reflection."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from productgraph.v1.event_ingestion_service_pb2 import DESCRIPTOR, IngestEventsResponse
from server.caller import Caller
from server.errors import IngestError, Internal, Unavailable
from server.events.protobuf_codec import ProtobufCodec
from server.grpc.certificates import Certificates, CertificateSource
from server.ingest.request_record import RequestRecord, RequestRecorder
from server.ingest.service import IngestService

MAX_MESSAGE_BYTES = 10 * 1024 * 1024
_HEALTH_SECONDS = 0.5
# Connections, not calls, are spread over the workers: renewed now and then, they spread again.
_MAX_CONNECTION_AGE_MS = 5 * 60 * 1000
_CONNECTION_GRACE_MS = 30 * 1000

T = TypeVar("T")

_SERVICE = DESCRIPTOR.services_by_name["EventIngestionService"].full_name
_API_KEY = "x-pg-api-key"
_REQUEST_ID = "x-request-id"

_log = logging.getLogger("productgraph.grpc")

Context = grpc.aio.ServicerContext[bytes, IngestEventsResponse]
Metadata = dict[str, str]


class IngestServicer:
    """Answers IngestEvents. Takes the request's bytes, so that each event is parsed by itself."""

    def __init__(
        self, service: IngestService, codec: ProtobufCodec, recorder: RequestRecorder | None = None
    ) -> None:
        self._service = service
        self._codec = codec
        self._recorder = recorder or RequestRecorder()

    def handler(self) -> "grpc.GenericRpcHandler[bytes, IngestEventsResponse]":
        """What a server is given to serve this method."""
        method = grpc.unary_unary_rpc_method_handler(
            self.ingest_events, response_serializer=IngestEventsResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(_SERVICE, {"IngestEvents": method})

    async def ingest_events(self, request: bytes, context: Context) -> IngestEventsResponse:
        """Stores an encoded IngestEventsRequest; returns once it is committed."""
        metadata = dict(context.invocation_metadata() or ())
        record = self._begin_record(request, context, metadata)
        status = "CANCELLED"
        try:
            key = str(metadata.get(_API_KEY, ""))
            response = await self._ingest(request, context, key, record)
            status = "OK"
            return response
        except IngestError as error:
            status = error.code
            return await _abort(context, record, error)
        except Exception:  # noqa: BLE001 - a fault is told without details
            status = Internal.code
            _log.exception("a request failed", extra={"request_id": record.request_id})
            return await _abort(context, record, Internal())
        finally:
            record.finish(status)

    def _begin_record(self, request: bytes, context: Context, metadata: Metadata) -> RequestRecord:
        request_id, traceparent = map(metadata.get, (_REQUEST_ID, "traceparent"))
        record = self._recorder.begin("grpc", request_id, traceparent)
        record.size_bytes = len(request)
        context.set_trailing_metadata(_trailers_of(record))
        return record

    async def _ingest(
        self, request: bytes, context: Context, key: str, record: RequestRecord
    ) -> IngestEventsResponse:
        deadline = self._service.deadline_after(context.time_remaining())
        caller = await self._authenticate(key)
        record.authenticated(caller.project_id)
        self._service.admit(caller, len(request))
        events = self._codec.parse_batch(request)
        response, stored = self._service.ingest(caller, events, deadline)
        record.decoded(response)
        await asyncio.wrap_future(stored)
        return response

    async def _authenticate(self, key: str) -> Caller:
        caller = self._service.authenticate(key)
        if caller is not None:
            return caller
        # Others may wait for the same look-up: the end of this call must not cancel it.
        found = asyncio.shield(asyncio.wrap_future(self._service.look_up_key(key)))
        try:
            return await asyncio.wait_for(found, self._service.timeout_seconds)
        except TimeoutError:
            raise Unavailable("not answered in time") from None


def _trailers_of(record: RequestRecord) -> tuple[tuple[str, str], ...]:
    return ((_REQUEST_ID, record.request_id),)


async def _abort(context: Context, record: RequestRecord, error: IngestError) -> NoReturn:
    trailers: tuple[tuple[str, str | bytes], ...] = (
        *_trailers_of(record),
        *_details_of(error),
    )
    await context.abort(grpc.StatusCode[error.code], str(error), trailing_metadata=trailers)


def _details_of(error: IngestError) -> tuple[tuple[str, bytes], ...]:
    """The trailer that carries google.rpc.RetryInfo, where a retry can help.

    https://grpc.io/docs/guides/error/#richer-error-model
    """
    if error.retry_after_seconds is None:
        return ()
    details = Any()
    details.Pack(RetryInfo(retry_delay=Duration(seconds=error.retry_after_seconds)))
    code = grpc.StatusCode[error.code].value[0]
    status = Status(code=code, message=str(error), details=[details])
    return (("grpc-status-details-bin", status.SerializeToString()),)


def _make_credentials(certificates: CertificateSource) -> grpc.ServerCredentials:
    """Credentials that follow the files: gRPC asks at each handshake, one at a time."""

    def find_renewed() -> grpc.ServerCertificateConfiguration | None:
        renewed = certificates.find_renewed()
        return None if renewed is None else _configure(renewed)

    return grpc.dynamic_ssl_server_credentials(
        _configure(certificates.first),
        find_renewed,  # type: ignore[arg-type]  # the stubs do not know that None means: unchanged
        require_client_authentication=certificates.first.client_ca is not None,
    )


def _configure(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)], certificates.client_ca
    )


class GrpcServer:
    """Serves in a thread of its own, which runs an event loop: no call in it may block."""

    def __init__(
        self,
        servicer: IngestServicer,
        is_ready: Callable[[], bool],
        *,
        address: str,
        offer_reflection: bool,
        certificates: CertificateSource | None = None,
    ) -> None:
        """Without certificates, the port speaks plain text."""
        self._servicer = servicer
        self._is_ready = is_ready
        self._address = address
        self._offer_reflection = offer_reflection
        self._certificates = certificates
        self._loop = asyncio.new_event_loop()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # stubs lack aio
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)

    def start(self) -> None:
        """Returns once the port is listened on; raises RuntimeError where it cannot be."""
        self._thread.start()
        self._server, self._refreshing = self._run(self._start())

    def stop(self, grace_seconds: float) -> None:
        """Refuses new calls, and answers those accepted for so long at the most."""
        self._run(self._stop(grace_seconds))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: "Coroutine[object, object, T]") -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self) -> tuple[grpc.aio.Server, asyncio.Task[None]]:
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_connection_age_ms", _MAX_CONNECTION_AGE_MS),
                ("grpc.max_connection_age_grace_ms", _CONNECTION_GRACE_MS),
            ]
        )
        server.add_generic_rpc_handlers((self._servicer.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._offer_reflection:
            names = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        if self._certificates is None:
            server.add_insecure_port(self._address)
        else:
            server.add_secure_port(self._address, _make_credentials(self._certificates))
        await server.start()
        return server, self._loop.create_task(self._refresh_health())

    async def _refresh_health(self) -> None:
        while True:
            states = health_pb2.HealthCheckResponse
            state = states.SERVING if self._is_ready() else states.NOT_SERVING
            for name in ("", _SERVICE):
                await self._health.set(name, state)
            await asyncio.sleep(_HEALTH_SECONDS)

    async def _stop(self, grace_seconds: float) -> None:
        self._refreshing.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)
