"""One StreamEvents call on one connection, with a number of messages always on their way."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

import grpc

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse, StreamEventsResponse
from tests.bench.events import NumberedRequest
from tests.bench.grpc_load import GrpcConnection
from tests.bench.meter import Meter

_ANSWER_SECONDS = 30.0


class StreamLoad:
    """A stream in which each answer is followed by another message while `run` runs."""

    def __init__(
        self,
        connection: GrpcConnection,
        requests: Sequence[NumberedRequest],
        count: int,
        first: int,
    ) -> None:
        self._connection = connection
        self._requests = requests
        response = IngestEventsResponse(accepted=count)
        self._accepted = StreamEventsResponse(response=response).SerializeToString()
        self._numbers = iter(range(first, 1 << 32))
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        self._sent: deque[tuple[NumberedRequest, float]] = deque()
        self._meter = Meter()
        self._stopping = False
        self._reader = threading.Thread(target=self._read, daemon=True)

    def start(self, meter: Meter) -> None:
        """Send the first messages."""
        self._meter = meter
        for request in self._requests:
            self._send(request)
        self._reader.start()

    def run(self, seconds: float, meter: Meter) -> None:
        """Keep the stream busy for this long."""
        self._meter = meter
        time.sleep(seconds)

    def finish(self, meter: Meter) -> None:
        """Wait for the outstanding answers, and close the connection."""
        self._meter = meter
        self._stopping = True
        self._reader.join(_ANSWER_SECONDS)
        self._connection.close()

    def _send(self, request: NumberedRequest) -> None:
        request.number(next(self._numbers))
        self._sent.append((request, time.perf_counter()))
        self._messages.put(bytes(request.buffer))

    def _read(self) -> None:
        answers: Iterator[bytes] = self._connection.stream(iter(self._messages.get, None))
        try:
            while self._sent:
                self._take(next(answers))
        except grpc.RpcError as error:
            self._meter.latencies.append(0.0)
            self._meter.failures[str(error)] += 1
        self._messages.put(None)

    def _take(self, answer: bytes) -> None:
        request, sent_at = self._sent.popleft()
        meter = self._meter
        meter.latencies.append(time.perf_counter() - sent_at)
        if answer != self._accepted:
            meter.failures[repr(answer)] += 1
        if not self._stopping:
            self._send(request)
