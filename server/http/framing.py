"""Where a request begins and ends: stricter than waitress, so that no two servers disagree."""

import time
from typing import Any

from waitress.buffers import OverflowableBuffer
from waitress.parser import HTTPRequestParser, ParsingError, get_header_lines
from waitress.receiver import ChunkedReceiver, FixedStreamReceiver
from waitress.utilities import BadRequest

from server.deferral import Deferral
from server.http.bodies import BodyBudget, DroppedBody
from server.http.heads import read_fields, read_start

_MAX_CHUNK_LINE_BYTES = 16 * 1024
# The first byte of a TLS handshake, and of no request.
TLS_HANDSHAKE = b"\x16"


class StrictChunks(ChunkedReceiver):
    """Refuses the empty lines that waitress skips instead of a chunk's size.

    Another server may take such a line for the last chunk, and what follows for the next request.
    """

    error: Any

    def received(self, data: bytes) -> int:
        """Take a part of the body; return how many of its bytes belong to it."""
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
        """Return no more than one line, or than what is left of one chunk."""
        if self.chunk_remainder > 0:
            return data[: self.chunk_remainder]
        if self.validate_chunk_end:
            return data[: 2 - len(self.chunk_end)]
        if self.all_chunks_received:
            return data
        end = data.find(b"\n") + 1
        return data[:end] if end else data


class RequestParser(HTTPRequestParser):
    """Refuses what waitress lets through: ambiguous framing, and lines without an end."""

    completed: bool
    connection_close: bool
    body_rcv: Any
    headers: dict[str, str]
    is_body_wanted = False  # until the gate has said so
    is_dropped = False
    held_bytes = 0  # as the budget knows them
    budget: BodyBudget | None = None
    held_answer: Any = None  # until what it waits for is done

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.deferral = Deferral()

    def received(self, data: bytes) -> int:
        """Take a part of the request; return how many of its bytes belong to it."""
        consumed: int = super().received(data)
        if self.chunked and not self.completed:
            # With each part that arrives, waitress searches both from their start.
            pending = len(self.body_rcv.control_line) + len(self.body_rcv.trailer)
            if pending > _MAX_CHUNK_LINE_BYTES:
                self.error = BadRequest("a chunk's size or the trailer is too long")
                self.completed = True
        if self.completed:
            self.deferral.received_at = time.monotonic()
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Read the head; raises ParsingError for a malformed or an ambiguous one."""
        try:
            self._read_head(header_plus)
        except ValueError:  # a Content-Length of thousands of digits, an address that is none
            raise ParsingError("Invalid request") from None

    def _read_head(self, header_plus: bytes) -> None:
        """Read the head as waitress does, which takes three times as long; a test compares both."""
        first_line, *lines = header_plus.split(b"\r\n")
        if b"\r\n " in header_plus or b"\r\n\t" in header_plus:
            lines = get_header_lines(b"\r\n".join(lines))
        headers = self.headers = read_fields(lines)
        if "TRANSFER_ENCODING" in headers:
            self._read_chunked(header_plus)
            return
        start = read_start(first_line)
        self.command, self.request_uri, self.version, self.path, self.query = start
        connection = headers.get("CONNECTION", "").lower()
        if self.version == "1.1":
            self._check_host()
            self.expect_continue = headers.get("EXPECT", "").lower() == "100-continue"
            self.connection_close = connection == "close"
        else:
            self.connection_close = connection != "keep-alive"
        length = headers.get("CONTENT_LENGTH", "0")
        if not (length.isascii() and length.isdigit()):
            raise ParsingError("Content-Length is invalid")
        self.content_length = int(length)
        if self.content_length > 0:
            buffer = OverflowableBuffer(self.adj.inbuf_overflow)
            self.body_rcv = FixedStreamReceiver(self.content_length, buffer)

    def _read_chunked(self, header_plus: bytes) -> None:
        self.headers = {}
        super().parse_header(header_plus)
        if self.version != "1.1":
            # https://www.rfc-editor.org/rfc/rfc9112#section-6.1-16
            raise ParsingError("Transfer-Encoding requires HTTP/1.1")
        self._check_host()
        if self.chunked:
            self._check_chunked(header_plus)
            self.body_rcv = StrictChunks(self.body_rcv.buf)

    def _check_host(self) -> None:
        # https://www.rfc-editor.org/rfc/rfc9112#section-3.2-6. No name of a host has a comma,
        # by which waitress joins the values of headers with one name.
        host = self.headers.get("HOST")
        if host is None or "," in host:
            raise ParsingError("Host is required, once")

    def _check_chunked(self, header_plus: bytes) -> None:
        # https://www.rfc-editor.org/rfc/rfc9112#section-6.1-15: it may be smuggling.
        if "CONTENT_LENGTH" in self.headers:
            raise ParsingError("Content-Length and Transfer-Encoding exclude each other")
        codings = [
            line.partition(b":")[2].strip(b" \t").lower()
            for line in get_header_lines(header_plus)
            if line.lower().startswith(b"transfer-encoding:")
        ]
        if codings != [b"chunked"]:
            raise ParsingError("Transfer-Encoding must be chunked, once")

    def drop_body(self) -> None:
        """Free what has arrived of the body, and keep nothing of what is still to come."""
        self.is_dropped = True
        if self.body_rcv is not None:
            held, self.body_rcv.buf = self.body_rcv.buf, DroppedBody(len(self.body_rcv))
            held.close()
        self._release()

    def rewind_body(self) -> None:
        """Let the body be read once more."""
        if self.body_rcv is not None:
            self.body_rcv.getfile().seek(0)

    def refuse_body(self, error: BaseException) -> None:
        """Drop the body, including what is still to come, and answer with this error."""
        self.deferral.failure = error
        self.drop_body()

    def end_at_head(self) -> None:
        """Take the request as it is: its body is not waited for, so nothing can follow it."""
        self.completed = True
        self.connection_close = True
        self.deferral.received_at = time.monotonic()

    def close(self) -> None:
        """Free the body."""
        super().close()
        self._release()

    def _release(self) -> None:
        if self.budget is not None:
            self.budget.release(self)
