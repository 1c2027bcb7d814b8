"""waitress as this service needs it: answers held back without a thread, and a lossless end.

No thread waits for the database while an answer is held (see deferral.py), so that thousands of
requests can wait at once and health checks are answered all the while. Small requests run in the
loop itself: handing one to a thread costs more than running it. Large ones run in one thread, one
at a time: decoded, a body can take thirty times its size, and what does not fit into the
processor's cache is slow.

What clients can take without completing a request is bounded: a gate decides by the head whether
a body is wanted, a budget bounds what is held of bodies, and when connections run out, the one
that has gone longest without completing a request is closed.

This relies on the insides of waitress 3.0.2, the version that is pinned: `HTTPChannel.service` runs
the first of `requests`, and reads nothing else from the connection until it has removed that one.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher

from server.deferral import ENVIRON_KEY
from server.errors import Unavailable
from server.http.bodies import BodyBudget
from server.http.framing import TLS_HANDSHAKE, RequestParser
from server.http.heads import Field, write_head
from server.http.polling import Connections
from server.wakeups import wake

# Up to this size a request is run by the loop.
SMALL_BODY_BYTES = 64 * 1024
# By the head of a request: whether its body is wanted, or the error that answers the request
# instead; or a future, and once that is done, the same question again.
Gate = Callable[[RequestParser], "bool | Exception | Future[Any]"]

_CONNECTIONS = 2000
# Connections accepted in one turn of the loop. With one, a flood of connections would keep others
# waiting for as many turns, which are slow with thousands of connections.
_ACCEPTED_AT_ONCE = 64
_LOOP_SECONDS = 1.0
_DRAIN_LOOP_SECONDS = 0.05
# While draining, a connection without a request is kept this long: one may be on its way. On
# a new connection that is the first, which clients do not expect to lose.
_IDLE_GRACE_SECONDS = 0.25
_FIRST_GRACE_SECONDS = 3.0
# Fields that WSGI names as HTTP does.
_ENVIRON_NAMES = {"CONTENT_LENGTH": "CONTENT_LENGTH", "CONTENT_TYPE": "CONTENT_TYPE"}


def _want_no_body(_request: RequestParser) -> bool:
    return False


class _Held(BaseException):
    """Leaves HTTPChannel.service before that counts the request as done.

    Not an Exception, which would be answered with a 500 there.
    """


class _Answer(NamedTuple):
    """An answer that is made, and may have to wait."""

    start: str
    fields: Sequence[Field]
    body: bytes


class _Task:
    """Answers one request: by the application, or with what that has made before."""

    def __init__(self, channel: "_Channel", request: RequestParser) -> None:
        self.request = request
        self.close_on_finish = False
        self.wrote_header = False
        self._channel = channel
        self._status = ""
        self._fields: Sequence[Field] = ()

    def service(self) -> None:
        answer, deferral = self.request.held_answer, self.request.deferral
        if answer is None:
            answer = self._make_answer()
            if deferral.awaited is not None or deferral.handed_over:
                self.request.held_answer = answer
                raise _Held
        self._send(answer)

    def _make_answer(self) -> _Answer:
        channel, request = self._channel, self.request
        chunks = channel.server.application(channel.make_environ(request), self._start_answer)
        try:
            body = b"".join(chunks)
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
        is_bodiless = self._status[:3] in ("204", "304")
        fields = [field for field in self._fields if field[0].lower() != "content-length"]
        if not is_bodiless:
            fields.append(("Content-Length", str(len(body))))
        start = f"HTTP/{'1.1' if request.version == '1.1' else '1.0'} {self._status}"
        return _Answer(start, fields, b"" if request.command == "HEAD" or is_bodiless else body)

    def _start_answer(
        self, status: str, fields: Sequence[Field], _exception: object = None
    ) -> None:
        """Be WSGI's `start_response`, but for the deprecated function that it returns."""
        self._status, self._fields = status, fields

    def _send(self, answer: _Answer) -> None:
        request = self.request
        self.close_on_finish = request.connection_close or self._channel.server.draining
        connection = "" if request.version == "1.1" else "Keep-Alive"
        if self.close_on_finish:
            connection = "close"
        head = write_head(answer.start, answer.fields, connection)
        self.wrote_header = True
        self._channel.send_answer(head + answer.body)


class _Channel(HTTPChannel):
    """One connection."""

    parser_class = RequestParser
    request: Any  # a RequestParser that is not complete, or None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.completed_at = self.creation_time
        self.waits_for_gate = False
        # What is the same for all requests of a connection; each gets a copy.
        self._environ = self.server.environ | {
            "REMOTE_ADDR": self.addr[0],
            "REMOTE_HOST": self.addr[0],
            "REMOTE_PORT": str(self.addr[1]),
        }

    def readable(self) -> bool:
        # As waitress has it, but for the gate: it is asked for each connection in each round.
        return not (
            self.waits_for_gate
            or self.requests
            or self.total_outbufs_len
            or self.will_close
            or self.close_when_flushed
        )

    def received(self, data: bytes) -> bool:
        if self.request is None and data.startswith(TLS_HANDSHAKE):
            self.will_close = True
            return False
        is_taken = bool(super().received(data))
        request = self.request
        if request is not None and request.headers_finished:
            self._ask_gate(request)
            if not request.is_dropped:
                self.server.bodies.note(request, len(request.body_rcv))
        return is_taken

    def _ask_gate(self, request: RequestParser) -> None:
        if request.is_body_wanted or request.is_dropped or self.waits_for_gate:
            return
        verdict = self.server.gate(request)
        if isinstance(verdict, Future):
            self.waits_for_gate = True
            verdict.add_done_callback(lambda _: self.server.resume(self))
        elif isinstance(verdict, Exception):
            request.refuse_body(verdict)
        elif verdict:
            request.is_body_wanted = True
        else:
            request.drop_body()

    def resume(self) -> None:
        """Ask the gate again, and read on."""
        self.waits_for_gate = False
        request = self.request
        if not self.connected or request is None:
            return
        self._ask_gate(request)
        with self.requests_lock:
            if request.expect_continue and not self.requests and not self.sent_continue:
                self.send_continue()
        self._add_ended()

    def send_continue(self) -> None:
        """Answer Expect: by 100 Continue if there is a body and it is wanted."""
        request = self.request
        if request.completed:  # there is none, or the head is refused
            request.expect_continue = False
            return
        self._ask_gate(request)
        if request.is_dropped:
            request.expect_continue = False
            request.end_at_head()
        elif request.is_body_wanted:
            super().send_continue()

    def _add_ended(self) -> None:
        """Take up a request that ended at its head outside of `received`."""
        with self.requests_lock:
            request = self.request
            if self.connected and request is not None and request.completed:
                self.request = None
                self.requests.append(request)
                if len(self.requests) == 1:
                    self.server.add_task(self)

    def task_class(self, channel: "_Channel", request: RequestParser) -> _Task:
        deferral = request.deferral
        deferral.handed_over = False
        failure = None if deferral.awaited is None else deferral.awaited.exception()
        if deferral.awaited is None or deferral.repeat or failure is not None:
            request.held_answer = deferral.awaited = None
            deferral.failure = failure or deferral.failure
        return _Task(channel, request)

    def make_environ(self, request: RequestParser) -> dict[str, Any]:
        """Return what WSGI tells the application of a request."""
        environ: dict[str, Any] = self._environ.copy()
        environ["REQUEST_METHOD"] = "GET" if request.command == "HEAD" else request.command
        environ["SERVER_PROTOCOL"] = f"HTTP/{request.version}"
        # One slash, however many there are: with two, a path would look like a host's name.
        path = request.path
        environ["PATH_INFO"] = f"/{path.lstrip('/')}" if path.startswith("//") else path
        environ["REQUEST_URI"] = request.request_uri
        environ["QUERY_STRING"] = request.query
        environ["wsgi.input"] = request.get_body_stream()
        environ[ENVIRON_KEY] = request.deferral
        for name, value in request.headers.items():
            environ[_ENVIRON_NAMES.get(name) or f"HTTP_{name}"] = value
        return environ

    def send_answer(self, content: bytes) -> None:
        """Send an answer, and leave to the loop what the connection does not take at once."""
        with self.outbuf_lock:
            if self.connected and not self.total_outbufs_len:
                with suppress(OSError):  # which the loop meets again
                    content = content[self.send(content, do_close=False) :]
        if content:
            self.write_soon(content)

    def service(self) -> None:
        request: RequestParser = self.requests[0]
        deferral = request.deferral
        try:
            super().service()
        except _Held:
            if deferral.awaited is None or deferral.repeat:
                request.rewind_body()
            elif request.held_bytes:
                request.drop_body()
            if deferral.awaited is None:
                self.server.hand_over(self)
                return
            deferral.awaited.add_done_callback(lambda _: self.server.take_up(self))
        else:
            self.server.note_service(self)
            self.completed_at = self.last_activity
            if deferral.pending is not None:
                deferral.pending.close()
            self._add_ended()

    def handle_close(self) -> None:
        if self.request is not None:
            self.request.close()
        super().handle_close()

    def is_idle(self) -> bool:
        """Return whether nothing of a request or an answer is on this connection."""
        return not self.requests and self.request is None and not self.total_outbufs_len

    def has_served(self) -> bool:
        """Return whether a request has been completed on this connection."""
        return bool(self.completed_at > self.creation_time)


class HTTPServer(TcpWSGIServer):
    """Serves a WSGI application on a bound socket: construct, `serve`, `drain`."""

    channel_class = _Channel

    def __init__(
        self,
        application: Callable[..., Any],
        listener: socket.socket,
        *,
        max_body_bytes: int = 1024,
        gate: Gate = _want_no_body,
        answer_seconds: float = 5.0,
        on_eviction: Callable[[], None] | None = None,
    ) -> None:
        """Without a gate, no body is kept. Who waits `answer_seconds` for the thread is refused.

        `on_eviction` is called for each connection that is closed to make room for another.
        """
        adjustments = Adjustments(
            threads=1,
            max_request_body_size=max_body_bytes,
            # A batch of a thousand events is usually smaller: it never touches the disk.
            inbuf_overflow=1 << 20,
            max_request_header_size=1 << 16,
            # What a turn of the loop reads of a connection. A batch of 50 comes whole: it takes 7 %
            # less of a processor than in parts of 8 KB, the default.
            recv_bytes=1 << 16,
            connection_limit=_CONNECTIONS,
            # No header of a proxy's is read here, so none needs to be removed.
            clear_untrusted_proxy_headers=False,
            log_socket_errors=False,
            ident="",
        )
        dispatcher = ThreadedTaskDispatcher()
        dispatcher.set_thread_count(1)
        self.gate = gate
        self.bodies = BodyBudget()
        self.draining = False
        self._answer_seconds = answer_seconds
        self._on_eviction = on_eviction
        self._stopping = False
        self._completed: list[_Channel] = []
        self._resumed: list[_Channel] = []
        self._completed_lock = threading.Lock()
        self._loop_thread: int | None = None
        # When the loop last turned, by `time.monotonic`.
        self.turned_at = time.monotonic()
        self._connections = Connections()
        super().__init__(
            application,
            map=self._connections,
            _sock=listener,
            dispatcher=dispatcher,
            adj=adjustments,
            sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
            bind_socket=False,
        )
        self.environ = {
            "SCRIPT_NAME": "",
            "SERVER_NAME": self.server_name,
            "SERVER_PORT": str(self.effective_port),
            "SERVER_SOFTWARE": "",
            "wsgi.errors": sys.stderr,
            "wsgi.input_terminated": True,
            "wsgi.multiprocess": False,
            "wsgi.multithread": True,
            "wsgi.run_once": False,
            "wsgi.url_scheme": "http",
            "wsgi.version": (1, 0),
        }

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
            self._close_idle(time.monotonic() - started)
        self.task_dispatcher.shutdown()
        wasyncore.close_all(self._map)
        self._connections.close()

    def _close_idle(self, drained: float) -> None:
        for channel in self.active_channels.values():
            grace = _IDLE_GRACE_SECONDS if channel.has_served() else _FIRST_GRACE_SECONDS
            channel.will_close = channel.will_close or (channel.is_idle() and drained >= grace)

    def handle_accept(self) -> None:
        """Accept what is queued, up to a bound, and make room for it."""
        for _ in range(_ACCEPTED_AT_ONCE):
            known = len(self.active_channels)
            super().handle_accept()
            if len(self.active_channels) == known:
                return
            if len(self._map) > _CONNECTIONS and not self.draining:
                self._make_room()

    def add_task(self, channel: _Channel) -> None:
        """Take up a request: in the loop if it is quick to answer, else in a thread."""
        if channel.requests[0].body_bytes_received <= SMALL_BODY_BYTES:
            self._add(channel, self._completed)
        else:
            self.hand_over(channel)

    def hand_over(self, channel: _Channel) -> None:
        """Take up a request in the thread."""
        channel.requests[0].deferral.in_loop = False
        super().add_task(channel)

    def take_up(self, channel: _Channel) -> None:
        """Take up a held request again. A whole group of them wakes the loop once."""
        if channel.requests[0].deferral.repeat:
            self.add_task(channel)
        else:
            self._add(channel, self._completed)

    def resume(self, channel: _Channel) -> None:
        """Let a connection go on that waits for the gate."""
        self._add(channel, self._resumed)

    def _add(self, channel: _Channel, channels: list[_Channel]) -> None:
        with self._completed_lock:
            is_first = not (self._completed or self._resumed)
            channels.append(channel)
        if is_first:
            wake(self.pull_trigger)

    def pull_trigger(self) -> None:
        """Wake the loop, unless it is the loop that asks."""
        if threading.get_ident() != self._loop_thread:
            super().pull_trigger()

    def note_service(self, channel: _Channel) -> None:
        """Have the loop look at a connection whose request was run, if it was run by a thread."""
        if threading.get_ident() != self._loop_thread:
            self._connections.mark(channel._fileno)
            super().pull_trigger()

    def _run_loop(self, seconds: float) -> None:
        if len(self._map) >= _CONNECTIONS and not self.draining:
            self._make_room()
        if self.task_dispatcher.queue:
            seconds = min(seconds, self._refuse_overdue())
        # What the loop itself has added since pulled no trigger: do not sleep on it.
        timeout = 0.0 if self._completed or self._resumed else seconds
        connections = self._connections
        connections.mark(self._fileno)  # whether it accepts depends on how many there are
        connections.run_once(timeout, sweep=self.draining)
        with self._completed_lock:
            completed, self._completed = self._completed, []
            resumed, self._resumed = self._resumed, []
        for channel in resumed:
            channel.resume()
            connections.mark(channel._fileno)
        for channel in completed:
            channel.requests[0].deferral.in_loop = True
            channel.service()
            connections.mark(channel._fileno)
        self.turned_at = time.monotonic()

    def _make_room(self) -> None:
        """Close the connection that has gone longest without completing a request.

        Never one with a request that is being answered.
        """
        waiting = [channel for channel in self.active_channels.values() if not channel.requests]
        if waiting:
            min(waiting, key=lambda channel: channel.completed_at).handle_close()
            if self._on_eviction is not None:
                self._on_eviction()

    def _refuse_overdue(self) -> float:
        """Refuse what has waited too long for the thread; return when to look again, in seconds."""
        overdue: list[_Channel] = []
        dispatcher, now = self.task_dispatcher, time.monotonic()
        left = _LOOP_SECONDS
        with dispatcher.lock:
            while dispatcher.queue:
                received_at = dispatcher.queue[0].requests[0].deferral.received_at
                left = received_at + self._answer_seconds - now
                if left > 0:
                    break
                overdue.append(dispatcher.queue.popleft())
        for channel in overdue:
            channel.requests[0].deferral.failure = Unavailable("not answered in time")
            self._add(channel, self._completed)
        return max(0.0, min(left, _LOOP_SECONDS))

    def _accept_queued(self) -> None:
        known = -1
        while known < len(self.active_channels):
            known = len(self.active_channels)
            self.handle_accept()
