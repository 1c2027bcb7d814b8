"""gRPC requests with one thing wrong, and what may be answered."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from productgraph.v1.event_pb2 import Event
from tests.hostile.grammar import damage, make_event, make_text
from tests.support.clients import encode_request, frame
from tests.support.events import to_message
from tests.support.projects import Project

_NUMBERS = [field.number for field in Event.DESCRIPTOR.fields]
_VARINTS = (b"\0", b"\1", b"\xff" * 9 + b"\1", b"\xff" * 10, b"\x80" * 11, b"\xff", b"\x80\0")
_BAD_TEXTS = (
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\xbd",
    b"a\0b",
    b"\0",
    b"",
    b"x" * 256,
    b"x" * 110_000,
)
_TIMES = ((2**63 - 1, 0), (-(2**63), 0), (0, -1), (0, 2**31 - 1), (253402300800, 0), (0, 10**9))
_DOUBLES = (float("nan"), float("inf"), -0.0, 1e308, 2.0**63)
_BAD_KEYS = (None, "", "x", "pgk_" + "a" * 40, "x" * 4000)


class Call(NamedTuple):
    """A request; which codes may be answered, and of how many events, `size`, `odd` is one.

    Where `odd` is None nothing is known of the events.
    """

    request: bytes
    key: str | None
    codes: tuple[str, ...]
    size: int = 0
    odd: int | None = None


class MessageGrammar:
    """Makes one call after the other; those whose events can be counted go to a project alone."""

    def __init__(self, random: Random, first: int, counted: Project, other: Project) -> None:
        self._random = random
        self._number = first
        self._counted = counted
        self._other = other
        self._kinds: list[Callable[[], Call]]
        self._kinds = [self._spoil_event] * 6 + [self._damage] * 2 + [self._spoil_key]
        self._spoil: list[Callable[[Event], bytes]]
        self._spoil = [
            self._mistype_field,
            self._misspell_text,
            self._spoil_time,
            self._spoil_object,
            lambda event: damage(event.SerializeToString(), self._random),
            lambda _event: self._random.randbytes(self._random.randrange(60)),
        ]

    def __call__(self) -> Call:
        """Return the next call."""
        return self._random.choice(self._kinds)()

    def _make_events(self, project: Project) -> list[Event | bytes]:
        count = self._random.randrange(1, 5)
        self._number += count
        return [to_message(make_event(project.id, self._number - index)) for index in range(count)]

    def _spoil_event(self) -> Call:
        events = self._make_events(self._counted)
        odd = self._random.randrange(len(events))
        event = events[odd]
        assert isinstance(event, Event)
        events[odd] = self._random.choice(self._spoil)(event)
        return Call(encode_request(events), self._counted.key, ("OK",), len(events), odd)

    def _damage(self) -> Call:
        request = damage(encode_request(self._make_events(self._other)), self._random)
        return Call(request, self._other.key, ("OK", "INVALID_ARGUMENT"))

    def _spoil_key(self) -> Call:
        request = encode_request(self._make_events(self._other))
        return Call(request, self._random.choice(_BAD_KEYS), ("UNAUTHENTICATED",))

    def _mistype_field(self, event: Event) -> bytes:
        """Add a field of any number and any wire type, including those that no longer exist."""
        number = self._random.choice([*_NUMBERS, 35, 2**28])
        tag = number << 3 | self._random.randrange(8)
        return event.SerializeToString() + _encode_varint(tag) + self._random.choice(_VARINTS)

    def _misspell_text(self, event: Event) -> bytes:
        content = self._random.choice(_BAD_TEXTS)
        return event.SerializeToString() + frame(self._random.choice(_NUMBERS), content)

    def _spoil_time(self, event: Event) -> bytes:
        seconds, nanos = self._random.choice(_TIMES)
        event.event_timestamp.CopyFrom(Timestamp(seconds=seconds, nanos=nanos))
        return event.SerializeToString()

    def _spoil_object(self, event: Event) -> bytes:
        struct = event.metadata
        for _ in range(self._random.choice((1, 30, 31, 32, 33, 90))):
            struct = _nest(struct, self._random)
        struct[make_text(self._random).encode("utf-8", "replace").decode()] = self._random.choice(
            _DOUBLES
        )
        return event.SerializeToString()


def _nest(struct: Struct, random: Random) -> Struct:
    """Add a new object to this one, or to an array of it."""
    value = struct.fields["a\0" if random.randrange(8) == 0 else "a"]
    if random.randrange(2):
        value = value.list_value.values.add()
    return value.struct_value


def _encode_varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
