"""The events of one request, as a codec reads them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.events.copy_rows import Row
from server.events.parsed import MalformedEvent, ParsedEvent

# An event that was found valid while it was read comes as its row.
ReadEvent = Row | ParsedEvent | MalformedEvent


@dataclass(frozen=True, slots=True)
class ParsedBatch:
    """The events of one request in order, each parsed when it is asked for.

    `count` is their number, `size` the bytes of the whole request. `received` returns the bytes of
    one that was parsed, by its index, in the form of `protocol`; None if they must not be kept.
    """

    protocol: str
    count: int
    size: int
    events: Iterator[ReadEvent]
    received: Callable[[int], bytes | None]
