"""gRPC calls over several connections, each call followed by the next as soon as it is answered."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import grpc

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from tests.bench.events import NumberedRequest
from tests.bench.meter import Meter
from tests.bench.processes import find_client_ports
from tests.support.clients import INGEST, STREAM

_CONNECT_SECONDS = 10.0
_CALL_SECONDS = 30.0


class GrpcConnection:
    """A channel with a connection of its own."""

    def __init__(self, port: int, key: str) -> None:
        before = find_client_ports(port)
        # Otherwise all channels of a process share one connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        grpc.channel_ready_future(self._channel).result(_CONNECT_SECONDS)
        [self.local_port] = find_client_ports(port) - before
        self._ingest = self._channel.unary_unary(INGEST, None, None)  # bytes as they are
        self._stream = self._channel.stream_stream(STREAM, None, None)
        self._metadata = (("x-pg-api-key", key),)

    def call(self, request: bytes) -> "grpc.CallFuture[bytes]":
        """Begin a call."""
        return self._ingest.future(request, timeout=_CALL_SECONDS, metadata=self._metadata)

    def stream(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Begin a stream of messages, and return their answers."""
        return cast("Iterator[bytes]", self._stream(messages, metadata=self._metadata))

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


@dataclass(frozen=True)
class _Stream:
    connection: GrpcConnection
    request: NumberedRequest


class GrpcLoad:
    """Streams that are all busy while `run` runs, dealt out to the connections in turn."""

    def __init__(
        self,
        connections: Sequence[GrpcConnection],
        requests: Sequence[NumberedRequest],
        count: int,
        first: int,
    ) -> None:
        self._connections = connections
        self._streams = [
            _Stream(connections[i % len(connections)], request)
            for i, request in enumerate(requests)
        ]
        self._accepted = IngestEventsResponse(accepted=count).SerializeToString()
        self._numbers: Iterator[int] = iter(range(first, 1 << 32))
        self._meter = Meter()
        self._stopping = False
        self._busy = threading.Semaphore(0)

    def start(self, meter: Meter) -> None:
        """Begin the first calls."""
        self._meter = meter
        for stream in self._streams:
            self._call(stream)

    def run(self, seconds: float, meter: Meter) -> None:
        """Keep all streams busy for this long."""
        self._meter = meter
        time.sleep(seconds)

    def finish(self, meter: Meter) -> None:
        """Wait for the outstanding answers, and close the connections."""
        self._meter = meter
        self._stopping = True
        for _ in self._streams:
            self._busy.acquire(timeout=_CALL_SECONDS)
        for connection in self._connections:
            connection.close()

    def _call(self, stream: _Stream) -> None:
        stream.request.number(next(self._numbers))
        request, started_at = bytes(stream.request.buffer), time.perf_counter()
        call = stream.connection.call(request)
        call.add_done_callback(lambda call: self._end(stream, call, started_at))

    def _end(self, stream: _Stream, call: "grpc.Future[bytes]", started_at: float) -> None:
        meter = self._meter
        meter.latencies.append(time.perf_counter() - started_at)
        failed = cast(grpc.Call, call)
        if failed.code() is not grpc.StatusCode.OK:
            meter.failures[f"{failed.code()}: {failed.details()}"] += 1
        elif call.result() != self._accepted:
            meter.failures[repr(call.result())] += 1
        if self._stopping:
            self._busy.release()
        else:
            self._call(stream)
