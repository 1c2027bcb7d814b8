"""Events with one thing wrong, the same for the same seed."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from random import Random
from typing import Any

from productgraph.v1.event_pb2 import Event as EventMessage

Event = dict[str, Any]

_START = datetime(2026, 1, 15)  # noqa: DTZ001 - UTC, and written as such
FIELDS = [field.json_name for field in EventMessage.DESCRIPTOR.fields]
REQUIRED = FIELDS[:5]

_TEXTS = (
    *("", " ", "\0", "\0" * 300, "\ud83d", "\udc00\ud83d", "\ufeff", "\u202e", "\x7f\x1b[31m"),
    *("x" * 255, "x" * 256, "é" * 128, "\U0001f600" * 64, "x" * 110_000, "9" * 10_000),
    *("\\N", "\\.", "\t\n\r\\", "'; DROP TABLE events; --", "%s%n", "${jndi:ldap://x}", "<script>"),
    *("__proto__", "constructor", "$where", "../../etc/passwd", "NaN", "null", "true", "-0", "1e5"),
    *("2024-01-15", "2024-02-30T00:00:00Z", "9999-12-31T23:59:59Z", "0000-01-01T00:00:00Z"),
    *("2024-01-15T10:30:60Z", "2024-01-15T24:00:00Z", "2024-01-15T10:30:00+99:99", "1705314600"),
)
_NUMBERS = (
    *(0, 1, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64),
    *(10**25, 10**400, 0.5, -0.0, 1e308, 5e-324, 123.4, 1e15 + 0.5),
)
# What stands for a value in JSON text and is not, or is more than it seems.
ODD_JSON = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" * 5000, b"1e-999", b"-", b"01"),
    *(b"+1", b".5", b"1.", b"0x1", b"tru", b"nul", b"undefined", b"'a'", b'"', b'"\\', b'"\\u12"'),
    *(
        b'"\\ud83d"',
        b'"\\ud83d\\ud83d"',
        b'"\\u0000"',
        b'"\x00"',
        b'"\x01"',
        b'"\xff"',
        b'"\xc0\x80"',
    ),
    *(b'"\xed\xa0\xbd"', b'"\xf5\x80\x80\x80"', b"/* */1", b"// 1", b"[1,]", b'{"a":1,}', b'{"a"}'),
    *(
        b'{"a":1,"a":2}',
        b'{"":0}',
        b'{"\\u0000":0,"\\ud83d":0}',
        b"[,]",
        b"{,}",
        b"",
        b",",
        b"]",
        b"}",
    ),
    *(
        b"[" * 60 + b"]" * 60,
        b'{"a":' * 40 + b"1" + b"}" * 40,
        b"[" * 2000,
        b"[" * 2000 + b"]" * 2000,
    ),
)


def make_event(project_id: str, number: int) -> Event:
    """Return a valid event whose id and time no other number gives."""
    time = _START + timedelta(microseconds=number)
    return {
        "event_id": f"evt_{number}",
        "project_id": project_id,
        "session.id": "sess_1",
        "event.type": "ui.click",
        "event.timestamp": f"{time.isoformat()}Z",
        "page.path": "/products",
        "duration_ms": 12,
        "metadata": {"plan": "pro", "tags": ["a", "b"]},
    }


def spoil_event(event: Event, random: Random) -> None:
    """Make one thing of a valid event wrong or odd."""
    kind = random.randrange(5)
    if kind == 0:
        del event[random.choice(REQUIRED)]
    elif kind == 1:
        event[random.choice(REQUIRED)] = make_value(random)
    elif kind == 2:
        event[make_text(random)[:1000]] = make_value(random)
    else:
        event[random.choice(FIELDS)] = make_value(random)


def make_value(random: Random, depth: int = 3) -> Any:
    """Return any JSON value; now and then one that nests deeper than allowed."""
    kind = random.randrange(12)
    if kind < 5:
        return make_text(random)
    if kind < 8:
        return random.choice(_NUMBERS)
    if kind == 8:
        return random.choice((None, True, False))
    if kind == 9:
        return nest(random.choice((30, 31, 32, 33, 63, 64, 65, 200)), random)
    size = random.randrange(4) if depth else 0
    values = [make_value(random, depth - 1) for _ in range(size)]
    return values if kind == 10 else {make_text(random)[:100]: value for value in values}


def make_text(random: Random) -> str:
    """Return any text."""
    if random.randrange(3):
        return random.choice(_TEXTS)
    ends = (0x80, 0x800, 0x10000, 0x110000)
    return "".join(chr(random.randrange(random.choice(ends))) for _ in range(random.randrange(20)))


def nest(depth: int, random: Random) -> Any:
    """Return this many arrays and objects, one inside the other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if random.randrange(2) else {"a": value}
    return value


def encode_batch(events: Sequence[Event]) -> bytes:
    """Return a body as JSON; what UTF-8 cannot hold is written as an escape."""
    return json.dumps({"events": events}, separators=(",", ":")).encode()


def damage(content: bytes, random: Random) -> bytes:
    """Return the bytes with a few of them changed, cut out, repeated, or inserted."""
    start = random.randrange(len(content) + 1)
    end = min(len(content), start + random.choice((0, 1, 1, 2, 8, 64, len(content))))
    kind = random.randrange(4)
    if kind == 0:
        return content[:start] + content[end:]
    if kind == 1:
        return content[:start] + random.randbytes(end - start) + content[end:]
    if kind == 2:
        return content[:end] + content[start:]
    return content[:start] + random.choice(ODD_JSON) + content[start:]
