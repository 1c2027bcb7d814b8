"""A client of HTTP/2 that sends frames as a test wants them, hostile ones included."""

import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_BYTES = 16_384
_INITIAL_WINDOW_SIZE = 4


class Frame(NamedTuple):
    """A frame that was received."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class Http2Client:
    """One connection in plain text; by itself it acknowledges settings and pings."""

    def __init__(self, port: int, seconds: float = 20.0) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), seconds)
        self._seconds = seconds
        self._buffer = b""
        self._next_stream = 1
        self._initial_window = 65_535
        self._windows = {0: 65_535}
        self._socket.sendall(_PREFACE)
        self.send(SETTINGS, 0, 0, b"")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def send(self, kind: int, flags: int, stream: int, payload: bytes, *, times: int = 1) -> None:
        """Send a frame, or the same one several times in one piece."""
        head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
        self._socket.sendall((head + struct.pack(">I", stream) + payload) * times)

    def begin_call(self, path: str, metadata: Mapping[str, bytes]) -> int:
        """Begin a call without a message; return the number of its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        usual = {
            ":method": b"POST",
            ":scheme": b"http",
            ":path": path.encode(),
            ":authority": b"localhost",
            "content-type": b"application/grpc",
            "te": b"trailers",
        }
        fields = [
            _encode_field(name.encode(), text) for name, text in {**usual, **metadata}.items()
        ]
        self._windows[stream] = self._initial_window
        self.send(HEADERS, END_HEADERS, stream, b"".join(fields))
        return stream

    def send_message(
        self, stream: int, content: bytes, *, size: int | None = None, patience: float = 0.5
    ) -> int:
        """Send what the windows allow of a message that says it has `size` bytes; return how much.

        Waits `patience` seconds for a window that is used up to be opened again.
        """
        sent, whole = 0, b"\0" + struct.pack(">I", size or len(content)) + content
        while sent < len(whole):
            room = min(self._windows[0], self._windows[stream], _FRAME_BYTES, len(whole) - sent)
            if room == 0 and not self._wait_for_window(patience):
                break
            if room:
                self.send(DATA, 0, stream, whole[sent : sent + room])
                self._windows[0] -= room
                self._windows[stream] -= room
                sent += room
        return sent

    def end_call(self, stream: int) -> None:
        """Say that no message follows."""
        self.send(DATA, END_STREAM, stream, b"")

    def frames(self, seconds: float | None = None) -> Iterator[Frame]:
        """Yield frames as they come, until the server closes or is silent for this long."""
        while (frame := self._receive(self._seconds if seconds is None else seconds)) is not None:
            yield frame

    def wait_for(self, kind: int, stream: int | None = None) -> Frame:
        """Return the next frame of a kind, on a stream if one is given."""
        for frame in self.frames():
            if frame.kind == kind and stream in (None, frame.stream):
                return frame
        raise AssertionError(f"no frame of kind {kind}")

    def wait_for_end(self, stream: int) -> bytes:
        """Return the trailers of a call, which are headers that end its stream."""
        for frame in self.frames():
            if frame.kind == HEADERS and frame.stream == stream and frame.flags & END_STREAM:
                return frame.payload
        raise AssertionError("no end of the call")

    def _wait_for_window(self, seconds: float) -> bool:
        return any(frame.kind == WINDOW_UPDATE for frame in self.frames(seconds))

    def _receive(self, seconds: float) -> Frame | None:
        until = time.monotonic() + seconds
        while not (frame := self._take_frame()):
            self._socket.settimeout(max(0.01, until - time.monotonic()))
            try:
                data = self._socket.recv(65_536)
            except (TimeoutError, ConnectionError):
                return None
            if not data:
                return None
            self._buffer += data
        if frame.kind == SETTINGS and not frame.flags & ACK:
            self._adopt(frame.payload)
            self.send(SETTINGS, ACK, 0, b"")
        if frame.kind == PING and not frame.flags & ACK:
            self.send(PING, ACK, 0, frame.payload)
        if frame.kind == WINDOW_UPDATE:
            (grown,) = struct.unpack(">I", frame.payload)
            self._windows[frame.stream] = self._windows.get(frame.stream, 0) + grown
        return frame

    def _adopt(self, settings: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", settings):
            if name == _INITIAL_WINDOW_SIZE:
                grown, self._initial_window = value - self._initial_window, value
                for stream in self._windows.keys() - {0}:
                    self._windows[stream] += grown

    def _take_frame(self) -> Frame | None:
        if len(self._buffer) < 9:
            return None
        (size,) = struct.unpack(">I", b"\0" + self._buffer[:3])
        if len(self._buffer) < 9 + size:
            return None
        kind, flags = self._buffer[3], self._buffer[4]
        (stream,) = struct.unpack(">I", self._buffer[5:9])
        payload, self._buffer = self._buffer[9 : 9 + size], self._buffer[9 + size :]
        return Frame(kind, flags, stream, payload)


@contextmanager
def connected(port: int) -> Iterator[Http2Client]:
    """Yield a connection, closed at the end."""
    client = Http2Client(port)
    try:
        yield client
    finally:
        client.close()


def _encode_field(name: bytes, value: bytes) -> bytes:
    """Return a field that enters no table, its texts as they are."""
    return b"\0" + _encode_text(name) + _encode_text(value)


def _encode_text(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text
