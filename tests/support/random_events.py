"""Events as real SDKs send them, some with values and names that are odd."""

import json
import os
from random import Random
from typing import Any

from productgraph.v1.event_pb2 import Event
from server.events.copy_rows import Row
from server.events.schema import EVENT_SCHEMA, Kind

PROJECT = "proj_quick"
# More are compared by setting it: the ways were compared on a million before a release.
COUNT = int(os.environ.get("QUICK_EVENTS", "20000"))
TEXTS = [
    *("", " ", "a", "é", "日本", "\t", "a\nb", "\r", "\x01", "\x01\x01", "\x7f", '"', "\\", "\\N"),
    *("\u2028", "\ufffd", "null", "NULL", "1", "2026-01-15T10:30:00Z", "x" * 300),
]
# These send all of their body through the exact parser.
UNREADABLE = ["\0", "\ud83d", 10**30, 1e300]
NUMBERS = [
    *(0, 1, -1, 200, 2**31 - 1, 2**31, -(2**31), 2**53, 2**53 + 1, 2**63 - 1, 2**63),
    *(0.0, -0.0, 0.5, -0.5, 1.5, 2.5, 123.4, 0.49999999999999994, 1e15 + 0.5, 1e16, 5e-324),
]
TIMES: list[Any] = [
    *("2026-01-15T10:30:00Z", "2026-01-15T10:30:00.123Z", "2026-01-15 10:30:00", ""),
    *("2026-01-15T10:30:00.1234567891234Z", "2026-01-15T10:30:00+05:30", "2026-01-15T10:30:60Z"),
    *("2026-02-30T10:30:00Z", "0001-01-01T00:00:00+10:00", "9999-12-31T23:59:60Z", "yesterday"),
    *("2026-11-27T10:30:00+0530", "2026-11-27T10:30:00,123Z", "20261127T103000Z"),
    *("2026-11-27T24:00:00Z", "0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01"),
    *("2026-01-15T10:30:00." + "1" * 60, {}, [], {"seconds": 1}, 1736937000, None, True),
]
OBJECTS = EVENT_SCHEMA.of_kind(Kind.OBJECT)
FIELDS = [field.wire_name for field in EVENT_SCHEMA.fields]


class RandomEvents:
    """Makes events as real SDKs send them, some with a value or a name that is odd."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._number = 0

    def make(self) -> Any:
        """Return the next event."""
        draw = self._random
        self._number += 1
        event = self._make_plain()
        for _ in range(draw.choice((0, 0, 0, 1, 1, 2, 4))):
            self._spoil(event)
        if draw.random() < 0.02:
            return draw.choice((None, [], "event", 7, {}))
        return event

    def _make_plain(self) -> dict[str, Any]:
        draw = self._random
        event: dict[str, Any] = {
            "event_id": f"evt_{self._number}",
            "project_id": PROJECT,
            "session.id": f"sess_{draw.randrange(9)}",
            "event.type": draw.choice(("page.view", "ui.click", "custom")),
            "event.timestamp": f"2026-01-15T10:30:00.{draw.randrange(1000):03}Z",
            "page.path": "/products",
            "page.referrer": draw.choice(("", None, "https://shop.example/")),
            "event.sequence": draw.randrange(100),
            "duration_ms": draw.choice((12, 123.4, None)),
            "metadata": {"plan": "pro", "position": draw.randrange(9), "price": 9.5},
            "user.anonymous_id": "anon",
        }
        if draw.random() < 0.5:
            del event["user.anonymous_id"]
        return event

    def _spoil(self, event: dict[str, Any]) -> None:
        draw = self._random
        name = draw.choice((*FIELDS, *FIELDS, "org.id", "", "odd\tname", "event_type"))
        if draw.random() < 0.01:
            event[name] = draw.choice(UNREADABLE)
        match draw.randrange(8):
            case 0:
                event.pop(name, None)
            case 1:
                event["event.timestamp"] = draw.choice(TIMES)
            case 2:
                event[name] = draw.choice((*TEXTS, *NUMBERS))
            case 3:
                event[name] = self._make_value(3)
            case 4:
                event[draw.choice(("metadata", "attributes", "org"))] = {
                    draw.choice(TEXTS): self._make_value(3) for _ in range(draw.randrange(4))
                }
            case _:
                event[name] = draw.choice((None, draw.choice(TEXTS)))

    def _make_value(self, depth: int) -> Any:
        draw = self._random
        kind = draw.randrange(8 if depth else 6)
        if kind == 6:
            return [self._make_value(depth - 1) for _ in range(draw.randrange(3))]
        if kind == 7:
            return {draw.choice(TEXTS): self._make_value(depth - 1) for _ in range(2)}
        return draw.choice((None, True, draw.choice(NUMBERS), draw.choice(TEXTS)))


def sort_entries(row: Row) -> Row:
    """Return the row with the entries of its objects in the one order that can be compared."""
    rest, *objects, time = row.text.rsplit("\t", 1 + len(OBJECTS))
    written = [cell and json.dumps(json.loads(cell), sort_keys=True) for cell in objects]
    encoded = Event.FromString(row.encoded).SerializeToString(deterministic=True)
    return row._replace(text="\t".join((rest, *written, time)), encoded=encoded)
