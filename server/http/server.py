"""waitress as this service needs it: answers held back without a thread, and a lossless end.

No thread waits for the database while an answer is held (see deferral.py), so that thousands of
requests can wait at once and health checks are answered all the while. Small requests run in the
loop itself: handing one to a thread costs more than running it.

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
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher, WSGITask

from server.http.deferral import ENVIRON_KEY
from server.http.framing import RequestParser

_SMALL_BODY_BYTES = 64 * 1024
_LOOP_SECONDS = 1.0
_DRAIN_LOOP_SECONDS = 0.05
# While draining, a connection without a request is kept this long: one may be on its way.
_IDLE_GRACE_SECONDS = 0.25


class _Held(BaseException):
    """Leaves HTTPChannel.service before that counts the request as done.

    Not an Exception, which would be answered with a 500 there.
    """

    def __init__(self, awaited: "Future[Any]") -> None:
        self.awaited = awaited


class _OutputBuffer:
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

    request: RequestParser
    channel: Any  # an _OutputBuffer once the answer is held back

    def __init__(self, channel: HTTPChannel, request: RequestParser) -> None:
        super().__init__(channel, request)
        self.get_environment()[ENVIRON_KEY] = request.deferral

    def service(self) -> None:
        super().service()
        awaited = self.request.deferral.awaited
        if awaited is not None:
            self.request.held = self
            raise _Held(awaited)

    def write(self, data: bytes) -> None:
        if not self.wrote_header and self.request.deferral.awaited is not None:
            self.channel = _OutputBuffer(self.channel)
        super().write(data)

    def build_response_header(self) -> bytes:
        if self.channel.server.draining:
            self.set_close_on_finish()
        header: bytes = super().build_response_header()
        return header


class _HeldAnswer:
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

    parser_class = RequestParser

    def task_class(self, channel: HTTPChannel, request: RequestParser) -> _Task | _HeldAnswer:
        deferral = request.deferral
        if deferral.awaited is None:
            return _Task(channel, request)
        deferral.failure = deferral.awaited.exception()
        if deferral.failure is None and not deferral.repeat:
            return _HeldAnswer(channel, request.held)
        deferral.awaited = None
        return _Task(channel, request)

    def service(self) -> None:
        deferral = self.requests[0].deferral
        try:
            super().service()
        except _Held as held:
            held.awaited.add_done_callback(lambda _: self.server.complete(self))
        else:
            if deferral.pending is not None:
                deferral.pending.close()

    def is_idle(self) -> bool:
        """Return whether nothing of a request or an answer is on this connection."""
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
        """Serve until `stop`; call `drain` next, in the same thread."""
        self._loop_thread = threading.get_ident()
        while not self._stopping:
            self._run_loop(_LOOP_SECONDS)

    def stop(self) -> None:
        """Make `serve` return; from any thread or a signal handler."""
        self._stopping = True
        super().pull_trigger()

    def drain(self, seconds: float) -> None:
        """Answer what has been accepted, within `seconds`, and close everything."""
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
        """Take up a new request: in the loop if it is quick to answer, else in a thread."""
        request = channel.requests[0]
        is_small = request.body_bytes_received <= _SMALL_BODY_BYTES
        if is_small and "CONTENT_ENCODING" not in request.headers:
            self.complete(channel)
        else:
            super().add_task(channel)

    def complete(self, channel: _Channel) -> None:
        """Take up a held request again. A whole group of them wakes the loop once."""
        with self._completed_lock:
            self._completed.append(channel)
            is_first = len(self._completed) == 1
        if is_first:
            self.pull_trigger()

    def pull_trigger(self) -> None:
        """Wake the loop, unless it is the loop that asks."""
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
