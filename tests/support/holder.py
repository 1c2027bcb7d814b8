"""A process that stores events as the service does, and stops before the end, holding them.

Run it in a network namespace to take its network away: python -m tests.support.holder URL POINT
EVENT, with EVENT the hexadecimal digits of an event in protobuf.
"""

import sys
import time
from io import BytesIO
from typing import Any, NoReturn

from productgraph.v1.event_pb2 import Event
from server.storage import events
from server.storage.connection import connected, open_engine
from tests.support.events import ENCODER, encode_message

IN_COPY, BEFORE_COMMIT = "in-copy", "before-commit"
POINTS = (IN_COPY, BEFORE_COMMIT)
HOLDING = "holding"
# PostgreSQL inserts what it is given by COPY a thousand rows at a time.
_FILLERS = 4000
_REQUEST_SECONDS = 5.0


def _hold(*_: object) -> NoReturn:
    sys.stdout.write(f"{HOLDING}\n")
    sys.stdout.flush()
    while True:
        time.sleep(60)


class _Halting(BytesIO):
    """What is left to copy; after three quarters of it nothing comes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._left = len(content) * 3 // 4

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next part; never returns once the rest is to be kept back."""
        if self._left <= 0:
            _hold()
        part = super().read(min(size or 0, self._left))
        self._left -= len(part)
        return part


def main() -> None:
    """Store the event and many others, up to the point."""
    url, point, encoded = sys.argv[1:]
    event = Event.FromString(bytes.fromhex(encoded))
    rows = [encode_message(event)]
    for number in range(_FILLERS):
        event.event_id = f"filler {number}"
        event.project_id = "~"  # behind the event, in the order of the key
        rows.append(encode_message(event))
    module: Any = events
    if point == IN_COPY:
        module.BytesIO = _Halting
    else:
        module.failpoints.reach = _hold
    with connected(open_engine(url)) as connection:
        events.EventStore(ENCODER.columns).save(connection, rows, _REQUEST_SECONDS)


if __name__ == "__main__":
    main()
