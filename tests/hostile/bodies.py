"""Bodies for POST /v1/events with one thing wrong, and what may be answered."""

import gzip
import json
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from tests.hostile.connection import Answer, encode_post
from tests.hostile.grammar import (
    ODD_JSON,
    damage,
    encode_batch,
    make_event,
    make_value,
    spoil_event,
)
from tests.support.projects import Project

_GZIP = b"Content-Encoding: gzip"
_SHAPES = (b"null", b"[]", b"{}", b'"events"', b"7", b'{"events":null}', b'{"events":{}}', b"")
_BAD_KEYS = (b"", b"x", b"pgk_" + b"a" * 40, b"pgk_\xff", b"x" * 5000, b"' OR 1=1", b"\tpgk_")
_BAD_TYPES = (b"", b"text/plain", b"application/jsonp", b"application/x-www-form-urlencoded", b";")
_BAD_CODINGS = (b"br", b"deflate", b"gzip, gzip", b"identity, br", b"\xff", b"zstd")


class Case(NamedTuple):
    """A request; which statuses its answer may have, and of how many events, `size`, `odd` is one.

    Where `odd` is None nothing is known of the events; -1 is that all are good.
    """

    request: bytes
    statuses: tuple[int, ...]
    size: int = 0
    odd: int | None = None


class BodyGrammar:
    """Makes one case after the other; those whose events can be counted go to a project alone."""

    def __init__(self, random: Random, first: int, counted: Project, other: Project) -> None:
        self._random = random
        self._number = first
        self._counted = counted
        self._other = other
        self._kinds: list[Callable[[], Case]]
        self._kinds = [self._spoil_event] * 5 + [self._splice_text] * 3 + [self._damage] * 3
        self._kinds += [self._shape, self._compress, self._damage_gzip, self._spoil_head]

    def __call__(self) -> Case:
        """Return the next case."""
        return self._random.choice(self._kinds)()

    def _make_events(self, project: Project) -> list[dict[str, object]]:
        count = self._random.randrange(1, 5)
        self._number += count
        return [make_event(project.id, self._number - index) for index in range(count)]

    def _spoil_event(self) -> Case:
        events = self._make_events(self._counted)
        odd = self._random.randrange(len(events))
        spoil_event(events[odd], self._random)
        request = encode_post(encode_batch(events), self._counted.key)
        return Case(request, (202,), len(events), odd)

    def _compress(self) -> Case:
        events = self._make_events(self._counted)
        body = gzip.compress(encode_batch(events), 1, mtime=0)
        return Case(encode_post(body, self._counted.key, _GZIP), (202,), len(events), -1)

    def _splice_text(self) -> Case:
        """Put text that is not JSON into an event."""
        events = self._make_events(self._other)
        event = self._random.choice(events)
        event[self._random.choice(list(event))] = "SPLICED"
        body = encode_batch(events).replace(b'"SPLICED"', self._random.choice(ODD_JSON))
        return Case(encode_post(body, self._other.key), (202, 400))

    def _damage(self) -> Case:
        body = damage(encode_batch(self._make_events(self._other)), self._random)
        return Case(encode_post(body, self._other.key), (202, 400))

    def _damage_gzip(self) -> Case:
        body = gzip.compress(encode_batch(self._make_events(self._other)), 1, mtime=0)
        return Case(encode_post(damage(body, self._random), self._other.key, _GZIP), (202, 400))

    def _shape(self) -> Case:
        body = self._random.choice(_SHAPES)
        if self._random.randrange(2):
            value = make_value(self._random)
            body = json.dumps({"event": value, "EVENTS": []}).encode()
        return Case(encode_post(body, self._other.key), (400,))

    def _spoil_head(self) -> Case:
        body, choose = encode_batch(self._make_events(self._other)), self._random.choice
        if (kind := self._random.randrange(3)) == 0:
            return Case(encode_post(body, choose(_BAD_KEYS)), (401,))
        if kind == 1:
            header = b"Content-Type: " + choose(_BAD_TYPES)
            return Case(encode_post(body, self._other.key, header), (415,))
        header = b"Content-Encoding: " + choose(_BAD_CODINGS)
        return Case(encode_post(body, self._other.key, header), (415,))


def find_problem(case: Case, answer: Answer) -> str | None:
    """Return what is wrong with an answer, or None."""
    if answer.status not in case.statuses:
        return f"answered {answer.status}"
    try:
        document = answer.json
    except ValueError:
        return "the answer is not JSON"
    if answer.status != 202:
        return None if set(document) == {"error"} else "an error without its text"
    if case.odd is None:
        return None
    return describe_outcome(document["accepted"], document["errors"], case.size, case.odd)


def describe_outcome(accepted: int, errors: list[object], count: int, odd: int) -> str | None:
    """Return what is wrong if only the event at `odd` may have been rejected, or None."""
    indexes = [error["index"] for error in errors]  # type: ignore[index]
    if accepted + len(indexes) != count or indexes not in ([], [odd]):
        return f"{accepted} of {count} events accepted, rejected: {indexes}, odd: {odd}"
    return None
