"""Analytics providers: what an event is to each, and what each of their answers means.

Nothing in here does I/O, reads a clock or knows of retries: requests and decisions are plain
values, and whoever forwards events carries them out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import orjson

from productgraph.v1.event_pb2 import Event

# What new events are kept with. Payloads of a version never change once it was released, since a
# second try must be recognised as one; the code of a version stays while events wait with it.
CURRENT_MAPPING_VERSION = 1

# How much of an answer is worth reading: 2,000 refused events with a reason each fit four times.
MAX_ANSWER_BYTES = 4 << 20

# No wait that a provider asks for is longer: what it says is not trusted to park events for days.
_LONGEST_WAIT_SECONDS = 3600.0
_MAX_REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Request:
    """A POST, ready to be sent; headers and body hold credentials, which stay out of its repr."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """A complete answer to a request, of which nothing is trusted.

    `body` may echo credentials, and stays out of the repr.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    def read_report(self) -> dict[str, Any] | None:
        """The JSON object of the body; None where there is none, or its `code` is another one."""
        try:
            report = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None
        trusted = isinstance(report, dict) and report.get("code", self.status) == self.status
        return report if trusted else None

    @property
    def retry_after(self) -> float:
        """The seconds that Retry-After asks to wait, at most an hour; 0 where it does not."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        text = headers.get("retry-after", "").strip()
        if text.isascii() and text.isdigit():
            return min(float(text), _LONGEST_WAIT_SECONDS)
        try:
            wait = _parse_date(text) - _parse_date(headers.get("date", ""))
        except (ValueError, OverflowError):
            return 0.0
        return min(max(wait.total_seconds(), 0.0), _LONGEST_WAIT_SECONDS)


@dataclass(frozen=True)
class Decision:
    """What becomes of the events of one request, each named by its index in exactly one place.

    - `done`: the provider has them.
    - `dead`: refused for good, with the reason.
    - `retry`: to be sent later, by the sender's backoff, and not before so many seconds.
    - `resend`: to be sent at once, each group as a request; groups are smaller than the request
      was, so that this ends.
    - `stop`: nothing is to be sent until the settings are right, for this reason; every event of
      the request is kept, and none is named elsewhere.
    """

    done: frozenset[int] = frozenset()
    dead: Mapping[int, str] = field(default_factory=dict)
    retry: Mapping[int, float] = field(default_factory=dict)
    resend: tuple[tuple[int, ...], ...] = ()
    stop: str | None = None


class Provider(Protocol):
    """One analytics service.

    `max_events` and `max_bytes` limit a request: its events, and the sum of their payloads.
    """

    name: str
    max_events: int
    max_bytes: int

    def encode_event(self, event: Event, version: int) -> bytes:
        """The payload of a stored event as JSON, by a version of the mapping.

        Raises KeyError for a version that this release does not know, and nothing else.
        """

    def build_request(self, payloads: Sequence[bytes]) -> Request:
        """The request that sends these payloads, as they are."""

    def decide(self, payloads: Sequence[bytes], answer: Answer | None) -> Decision:
        """What an answer to these payloads means; None: there was none, or not all of it."""


def decide_by_status(count: int, answer: Answer) -> Decision:
    """What an answer to so many events means where its body has nothing to add."""
    if answer.status in (401, 403):
        return Decision(stop=f"the credentials were refused ({answer.status})")
    # A wrong URL takes nothing and loses nothing, and no amount of retrying makes it right.
    if answer.status in (404, 405, 410):
        return Decision(stop=f"the endpoint does not take events ({answer.status})")
    if answer.status == 413:
        return halve(count, "larger than a request may be (413)")
    # Redirects are not followed: they could lead anywhere, with the credentials.
    return retry_all(count, answer.retry_after)


def accept_all(count: int) -> Decision:
    """The provider has every event."""
    return Decision(done=frozenset(range(count)))


def retry_all(count: int, seconds: float = 0.0) -> Decision:
    """Nothing is known of any event, and each is to be sent again."""
    return Decision(retry=dict.fromkeys(range(count), seconds))


def halve(count: int, reason: str) -> Decision:
    """Something is wrong with some event: sends halves, or refuses the one it must be."""
    if count < 2:
        return Decision(dead=dict.fromkeys(range(count), reason))
    middle = count // 2
    return Decision(resend=(tuple(range(middle)), tuple(range(middle, count))))


def is_index(value: Any, count: int) -> bool:
    """Whether a value from an answer names one of so many events."""
    return type(value) is int and 0 <= value < count


def read_text(value: Any) -> str:
    """A text from an answer, on one line and cut short, fit to be stored; empty for all else."""
    text = value[:_MAX_REASON_CHARACTERS] if isinstance(value, str) else ""
    return "".join(character if character.isprintable() else " " for character in text)


def _parse_date(text: str) -> datetime:
    date = parsedate_to_datetime(text)
    return date if date.tzinfo else date.replace(tzinfo=UTC)
