"""Where a request begins and ends: stricter than waitress, so that no two servers disagree."""

import time
from typing import Any

from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver
from waitress.utilities import BadRequest

from server.http.deferral import Deferral

_MAX_CHUNK_LINE_BYTES = 16 * 1024


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
    """Refuses what waitress lets through: ambiguous lengths, and lines without an end."""

    completed: bool
    body_rcv: Any
    deferral: Deferral
    held: Any = None  # the task whose answer is held back

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
            self.deferral = Deferral(time.monotonic())
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Read the head; raises ParsingError for a malformed one."""
        try:
            super().parse_header(header_plus)
        except ValueError:  # a Content-Length of thousands of digits, an address that is none
            raise ParsingError("Invalid request") from None
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            # https://www.rfc-editor.org/rfc/rfc9112#section-6.1-15: it may be smuggling.
            raise ParsingError("Content-Length and Transfer-Encoding exclude each other")
        if self.chunked:
            self.body_rcv = StrictChunks(self.body_rcv.buf)
