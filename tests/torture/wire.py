"""What the harness's proxy must read of PostgreSQL's protocol, to know when a commit passes.

https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

import struct
from collections.abc import Iterator

# What a client may send before its startup message; each is answered by a byte.
_NEGOTIATIONS = {80877103, 80877104}  # SSLRequest, GSSENCRequest


class FrontendMessages:
    """Cuts what a client sends to PostgreSQL into messages, however it arrives."""

    def __init__(self) -> None:
        self._rest = b""
        self._has_started = False
        self._has_copied = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Return the messages that are complete now; the bytes are the same, in the same order."""
        self._rest += data
        while (size := self._find_size()) and len(self._rest) >= size:
            message, self._rest = self._rest[:size], self._rest[size:]
            self._note(message)
            yield message

    def commits_rows(self, message: bytes) -> bool:
        """Return whether the last message is a COMMIT and this client has copied rows."""
        return self._has_copied and message[:1] == b"Q" and message[5:].startswith(b"COMMIT")

    def _find_size(self) -> int | None:
        head = 1 if self._has_started else 0
        if len(self._rest) < head + 4:
            return None
        return head + int(struct.unpack_from("!I", self._rest, head)[0])

    def _note(self, message: bytes) -> None:
        if not self._has_started:
            self._has_started = struct.unpack_from("!I", message, 4)[0] not in _NEGOTIATIONS
        elif message[:1] == b"d":
            self._has_copied = True
