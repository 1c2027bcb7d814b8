"""The gRPC server: the methods of api.py, the standard health service, reflection."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import TypeVar

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from server.events.schema import MAX_REQUEST_BYTES
from server.grpc.api import SERVICE, IngestServicer
from server.grpc.certificates import Certificates, CertificateSource
from server.grpc.keyless import KeylessHandlers
from server.grpc.streaming import STREAM_SECONDS
from server.grpc.symbols import SymbolPool

_HEALTH_SECONDS = 0.5
# Calls wait for their commits: thousands can, and all that a connection may have are cheap.
_CALLS, _STREAMS_OF_CONNECTION = 4096, 256
# Clients are commonly set to a ping every 10 s. Those that send more are sent away.
_PING_INTERVAL_MS = 5000
# Connections, not calls, are spread over the workers: renewed now and then, they spread again.
_MAX_CONNECTION_AGE_MS = 5 * 60 * 1000
# Calls on a connection past its age may end: the longest is a stream, with its last answers.
_CONNECTION_GRACE_MS = int(STREAM_SECONDS + 30) * 1000

T = TypeVar("T")


def _make_credentials(certificates: CertificateSource) -> grpc.ServerCredentials:
    """Return credentials that follow the files: gRPC asks at each handshake, one at a time."""

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


def _is_fit_to_log(entry: logging.LogRecord) -> bool:
    """Return False for what gRPC logs of metadata that is no UTF-8: all of it, keys included."""
    return not str(entry.msg).startswith("Invalid encoding")


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
        # When the loop last turned, by `time.monotonic`.
        self.turned_at = time.monotonic()

    def start(self) -> None:
        """Return once the port is listened on; raises RuntimeError if it cannot be."""
        self._thread.start()
        self._server, self._refreshing = self._run(self._start())

    def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, and answer those accepted within `grace_seconds`."""
        self._run(self._stop(grace_seconds))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: "Coroutine[object, object, T]") -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self) -> tuple[grpc.aio.Server, asyncio.Task[None]]:
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_fit_to_log)
        server = grpc.aio.server(
            maximum_concurrent_rpcs=_CALLS,
            options=[
                ("grpc.max_concurrent_streams", _STREAMS_OF_CONNECTION),
                # It would let each stream send megabytes ahead of a call that asks for them. A call
                # that asks is sent a whole message without it.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS),
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_connection_age_ms", _MAX_CONNECTION_AGE_MS),
                ("grpc.max_connection_age_grace_ms", _CONNECTION_GRACE_MS),
            ],
        )
        keyless = KeylessHandlers()
        server.add_generic_rpc_handlers((self._servicer.handler(), keyless))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, keyless)
        if self._offer_reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            servicer = reflection.aio.ReflectionServicer(  # type: ignore[attr-defined]
                names, SymbolPool(descriptor_pool.Default())
            )
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, keyless)
        if self._certificates is None:
            server.add_insecure_port(self._address)
        else:
            server.add_secure_port(self._address, _make_credentials(self._certificates))
        await server.start()
        return server, self._loop.create_task(self._refresh_health())

    async def _refresh_health(self) -> None:
        while True:
            self.turned_at = time.monotonic()
            states = health_pb2.HealthCheckResponse
            state = states.SERVING if self._is_ready() else states.NOT_SERVING
            for name in ("", SERVICE):
                await self._health.set(name, state)
            await asyncio.sleep(_HEALTH_SECONDS)

    async def _stop(self, grace_seconds: float) -> None:
        self._refreshing.cancel()
        await self._health.enter_graceful_shutdown()
        self._servicer.streams.stop()
        await self._server.stop(grace_seconds)
        self._servicer.stop()
