"""waitress as this service needs it: answers held back without a thread, and a lossless end.

An application behind it may put its answer off: it hands the callable `HOLD` of the WSGI
environment a future, and returns its answer at once. The answer is sent when the future is done;
should that fail, the application is called again for the same request, with the exception as
`FAILURE` in the environment, to answer otherwise. With `repeat=True` it is called again, as if for
the first time, in either case. So no thread waits for the database, while thousands of requests
can, and health checks are always answered.

What the application hands to the callable `KEEP`, it finds as `KEPT` when it is called again for
the same request. Its method `close` is called once, when the request is over: the answer has been
handed to the connection, or its client is gone.

When the whole of a request had arrived, on the clock of `time.monotonic`, is in `RECEIVED`: a large
one may have waited for its turn.

Small requests are run by the loop itself: handing them to a thread costs more than they do.

This relies on the insides of waitress 3.0.2, the version that is pinned: `HTTPChannel.service` runs
the first of `requests`, and reads nothing else from the connection until it has removed that one.
"""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher, WSGITask
from waitress.utilities import BadRequest

HOLD = "productgraph.hold"
FAILURE = "productgraph.failure"
KEEP = "productgraph.keep"
KEPT = "productgraph.kept"
RECEIVED = "productgraph.received"

_SMALL_BODY_BYTES = 64 * 1024
_MAX_CHUNK_LINE_BYTES = 16 * 1024
_LOOP_SECONDS = 1.0
_DRAIN_LOOP_SECONDS = 0.05
# While draining, a connection without a request is kept so long: one may be on its way.
_IDLE_GRACE_SECONDS = 0.25


class _Chunks(ChunkedReceiver):
    """Refuses the empty lines that waitress skips where the size of a chunk is due.

    To another server they may be the last chunk, and what follows a request of its own.
    """

    error: Any

    def received(self, data: bytes) -> int:
        """Takes a part of the body; says how many of its bytes belong to it."""
        consumed = 0
        while consumed < len(data) and not (self.completed or self.error):
            part = self._next_part(data[consumed:])
            if (self.control_line + part).startswith(b"\r\n") and self._awaits_size():
                self.error = BadRequest("Invalid chunk size")
                self.all_chunks_received = True
                return len(data)
            consumed += super().received(part)
        return consumed

    def _awaits_size(self) -> bool:
        is_within = self.chunk_remainder > 0 or self.validate_chunk_end
        return not (is_within or self.all_chunks_received)

    def _next_part(self, data: bytes) -> bytes:
        """No more than one line, or what is left of one chunk."""
        if self.chunk_remainder > 0:
            return data[: self.chunk_remainder]
        if self.validate_chunk_end:
            return data[: 2 - len(self.chunk_end)]
        if self.all_chunks_received:
            return data
        end = data.find(b"\n") + 1
        return data[:end] if end else data


class _Parser(HTTPRequestParser):
    """Refuses what waitress lets through: ambiguous lengths, and lines without an end."""

    completed: bool
    body_rcv: Any
    kept: Any = None
    received_at: float

    def received(self, data: bytes) -> int:
        """Takes a part of the request; says how many of its bytes belong to it."""
        consumed: int = super().received(data)
        if self.chunked and not self.completed:
            # Both are searched from their start for each part that arrives.
            pending = len(self.body_rcv.control_line) + len(self.body_rcv.trailer)
            if pending > _MAX_CHUNK_LINE_BYTES:
                self.error = BadRequest("a chunk's size or the trailer is too long")
                self.completed = True
        if self.completed:
            self.received_at = time.monotonic()
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Reads the head; raises ParsingError for a malformed one."""
        try:
            super().parse_header(header_plus)
        except ValueError:  # a Content-Length of thousands of digits, an address that is none
            raise ParsingError("Invalid request") from None
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            # https://www.rfc-editor.org/rfc/rfc9112#section-6.1-15: it may be smuggling.
            raise ParsingError("Content-Length and Transfer-Encoding exclude each other")
        if self.chunked:
            self.body_rcv = _Chunks(self.body_rcv.buf)


class _Held(BaseException):
    """Leaves HTTPChannel.service before that counts the request as done.

    Not an Exception, which would be answered with a 500 there.
    """

    def __init__(self, awaited: "Future[Any]") -> None:
        self.awaited = awaited


class _Recorder:
    """Stands in for the channel of a held task, and keeps what it writes."""

    def __init__(self, channel: HTTPChannel) -> None:
        self.server = channel.server
        self.adj = channel.adj
        self.output: list[bytes] = []

    def write_soon(self, data: bytes) -> int:
        self.output.append(data)
        return len(data)


class _Task(WSGITask):
    """Calls the application for one request."""

    channel: Any  # a _Recorder once the answer is held back

    def __init__(
        self,
        channel: HTTPChannel,
        request: HTTPRequestParser,
        failure: BaseException | None = None,
    ) -> None:
        super().__init__(channel, request)
        self.awaited: Future[Any] | None = None
        self.repeat = False
        environ = self.get_environment()
        environ[HOLD] = self._hold
        environ[FAILURE] = failure
        environ[KEEP] = self._keep
        environ[KEPT] = request.kept
        environ[RECEIVED] = request.received_at

    def _hold(self, awaited: "Future[Any]", *, repeat: bool = False) -> None:
        self.awaited = awaited
        self.repeat = repeat
        self.channel = _Recorder(self.channel)

    def _keep(self, thing: Any) -> None:
        self.request.kept = thing

    def service(self) -> None:
        super().service()
        if self.awaited is not None:
            self.request.held = self
            raise _Held(self.awaited)

    def build_response_header(self) -> bytes:
        if self.channel.server.draining:
            self.set_close_on_finish()
        header: bytes = super().build_response_header()
        return header


class _Replay:
    """Sends what a held task has written."""

    wrote_header = True

    def __init__(self, channel: HTTPChannel, held: _Task) -> None:
        self.request = held.request
        self.close_on_finish = held.close_on_finish
        self._channel = channel
        self._response = b"".join(held.channel.output)

    def service(self) -> None:
        if self._channel.server.draining and not self.close_on_finish:
            self.close_on_finish = True
            status, head, rest = self._response.partition(b"\r\n")
            self._response = b"".join((status, b"\r\nConnection: close", head, rest))
        self._channel.write_soon(self._response)


class _Channel(HTTPChannel):
    """One connection."""

    parser_class = _Parser

    def task_class(self, channel: HTTPChannel, request: HTTPRequestParser) -> _Task | _Replay:
        held = getattr(request, "held", None)
        if held is None:
            return _Task(channel, request)
        failure = held.awaited.exception()
        if failure or held.repeat:
            request.held = None
            return _Task(channel, request, failure)
        return _Replay(channel, held)

    def service(self) -> None:
        request = self.requests[0]
        try:
            super().service()
        except _Held as held:
            held.awaited.add_done_callback(lambda _: self.server.complete(self))
        else:
            if request.kept is not None:
                request.kept.close()

    def is_idle(self) -> bool:
        """Whether nothing of a request or an answer is on this connection."""
        return not self.requests and self.request is None and not self.total_outbufs_len


class HTTPServer(TcpWSGIServer):
    """Serves a WSGI application on a bound socket: construct, `serve`, `drain`."""

    channel_class = _Channel

    def __init__(
        self,
        application: Callable[..., Any],
        listener: socket.socket,
        *,
        threads: int,
        max_body_bytes: int,
    ) -> None:
        adjustments = Adjustments(
            threads=threads,
            max_request_body_size=max_body_bytes,
            # A batch of a thousand events is usually smaller: it never touches the disk.
            inbuf_overflow=1 << 20,
            max_request_header_size=1 << 16,
            connection_limit=2000,
            asyncore_use_poll=True,
            # No header of a proxy's is read here, so none needs to be removed.
            clear_untrusted_proxy_headers=False,
            log_socket_errors=False,
            ident="",
        )
        dispatcher = ThreadedTaskDispatcher()
        dispatcher.set_thread_count(threads)
        self.draining = False
        self._stopping = False
        self._completed: list[_Channel] = []
        self._completed_lock = threading.Lock()
        self._loop_thread: int | None = None
        super().__init__(
            application,
            map={},
            _sock=listener,
            dispatcher=dispatcher,
            adj=adjustments,
            sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
            bind_socket=False,
        )

    def serve(self) -> None:
        """Serves until `stop`; `drain` is to follow in the same thread."""
        self._loop_thread = threading.get_ident()
        while not self._stopping:
            self._run_loop(_LOOP_SECONDS)

    def stop(self) -> None:
        """Makes `serve` return; from any thread or a signal handler."""
        self._stopping = True
        super().pull_trigger()

    def drain(self, seconds: float) -> None:
        """Answers what has been accepted, for so long at the most, and closes everything."""
        self.draining = True
        started = time.monotonic()
        # Closing the listener resets what is still queued on it.
        self._accept_queued()
        wasyncore.dispatcher.close(self)  # the listener only: the loop still needs its trigger
        while self.active_channels and time.monotonic() < started + seconds:
            self._run_loop(_DRAIN_LOOP_SECONDS)
            if time.monotonic() >= started + _IDLE_GRACE_SECONDS:
                for channel in self.active_channels.values():
                    channel.will_close = channel.will_close or channel.is_idle()
        self.task_dispatcher.shutdown()
        wasyncore.close_all(self._map)

    def add_task(self, channel: _Channel) -> None:
        """Takes up a new request: in the loop if it is quick to answer, in a thread if not."""
        request = channel.requests[0]
        is_small = request.body_bytes_received <= _SMALL_BODY_BYTES
        if is_small and "CONTENT_ENCODING" not in request.headers:
            self.complete(channel)
        else:
            super().add_task(channel)

    def complete(self, channel: _Channel) -> None:
        """Takes up a held request again. A whole group of them wakes the loop once."""
        with self._completed_lock:
            self._completed.append(channel)
            is_first = len(self._completed) == 1
        if is_first:
            self.pull_trigger()

    def pull_trigger(self) -> None:
        """Wakes the loop, unless it is the loop that asks."""
        if threading.get_ident() != self._loop_thread:
            super().pull_trigger()

    def _run_loop(self, seconds: float) -> None:
        # What the loop itself has added since pulled no trigger: do not sleep on it.
        timeout = 0.0 if self._completed else seconds
        wasyncore.loop(timeout, use_poll=True, map=self._map, count=1)
        with self._completed_lock:
            completed, self._completed = self._completed, []
        for channel in completed:
            channel.service()

    def _accept_queued(self) -> None:
        known = -1
        while known < len(self.active_channels):
            known = len(self.active_channels)
            self.handle_accept()
