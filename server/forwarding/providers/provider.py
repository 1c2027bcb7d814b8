"""What all analytics providers have in common: requests, answers, and what an answer decides.

Nothing here does I/O, reads a clock or knows of retries: requests and decisions are plain values,
which the lane carries out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import orjson

# New events are kept with this version. Payloads of a version never change once it is released,
# since a provider must recognise a second try; its code stays as long as events wait with it.
CURRENT_MAPPING_VERSION = 2

# An answer that refuses 2,000 events, with a reason for each, fits four times.
MAX_ANSWER_BYTES = 4 << 20

# The longest wait that a provider may ask for: no answer parks events for days.
_LONGEST_WAIT_SECONDS = 3600.0
_MAX_REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Request:
    """A request, ready to be sent; headers and body hold credentials and are not in its repr."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    method: str = "POST"


@dataclass(frozen=True)
class Answer:
    """A complete answer to a request. Nothing in it is trusted.

    `body` may echo credentials and is not in the repr.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    def read_report(self) -> dict[str, Any] | None:
        """Return the JSON object of the body; None if it is none, or has another `code`."""
        try:
            report = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None
        trusted = isinstance(report, dict) and report.get("code", self.status) == self.status
        return report if trusted else None

    @property
    def retry_after(self) -> float:
        """The seconds that Retry-After asks for, at most an hour; 0 if it asks for none."""
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
class NoAnswer:
    """Why there is no answer, or not all of one."""

    reason: str


@dataclass(frozen=True)
class Suspicion:
    """A single event may have caused an answer that does not say which.

    If `is_refusal`, that event is refused for good, provided that the provider accepts another one;
    otherwise it is to be sent again later.
    """

    reason: str
    is_refusal: bool


@dataclass(frozen=True)
class Decision:
    """What becomes of the events of one request, each named by its index in exactly one place.

    - `done`: the provider has them.
    - `dead`: refused for good, with the reason.
    - `retry`: to be sent later, by the lane's backoff, and not before so many seconds.
      `retry_reasons` has the reasons that the answer gives for some of them.
    - `resend`: to be sent at once, each group as a request; groups are smaller than the request
      was, so that this ends.

    Two decisions are about the request as a whole and name no event:

    - `suspicion`: the event that caused the answer is to be found.
    - `stop`: nothing is to be sent until the settings are right, for this reason.
    """

    done: frozenset[int] = frozenset()
    dead: Mapping[int, str] = field(default_factory=dict)
    retry: Mapping[int, float] = field(default_factory=dict)
    retry_reasons: Mapping[int, str] = field(default_factory=dict)
    resend: tuple[tuple[int, ...], ...] = ()
    suspicion: Suspicion | None = None
    stop: str | None = None


class Provider(Protocol):
    """One analytics service.

    `max_events` and `max_bytes` limit a request: its events, and the sum of their payloads.
    `secrets` are the forms of the credential that an answer might repeat.
    """

    name: str
    max_events: int
    max_bytes: int
    secrets: tuple[str, ...]

    def encode_event(self, encoded: bytes, version: int) -> bytes:
        """Return the payload of a stored event, given as protobuf, by a version of the mapping.

        Raises KeyError for a version that this release does not know, and DecodeError or TooDeep
        for what is no stored event.
        """

    def build_request(self, payloads: Sequence[bytes]) -> Request:
        """Return the request that sends these payloads, as they are."""

    def decide(self, payloads: Sequence[bytes], answer: Answer | None) -> Decision:
        """Decide what an answer to these payloads means; None stands for no answer."""


def decide_by_status(count: int, answer: Answer) -> Decision:
    """Decide what an answer to `count` events means if its body has nothing to add."""
    if answer.status == 401:
        return Decision(stop="the credentials were refused (401)")
    # From a firewall because of what one event holds, or from a wrong URL, which takes nothing.
    if answer.status in (403, 404, 405, 410):
        return Decision(suspicion=Suspicion(f"refused ({answer.status})", is_refusal=True))
    if answer.status == 413:
        return halve(count, "larger than a request may be (413)")
    # Redirects are not followed: they could lead anywhere, with the credentials.
    return retry_all(count, answer.retry_after)


def accept_all(count: int) -> Decision:
    """Decide that the provider has every event."""
    return Decision(done=frozenset(range(count)))


def retry_all(count: int, seconds: float = 0.0) -> Decision:
    """Decide that nothing is known of any event, and that each is to be sent again."""
    return Decision(retry=dict.fromkeys(range(count), seconds))


def halve(count: int, reason: str) -> Decision:
    """Decide to send halves if something is wrong with some event, or to refuse the only one."""
    if count < 2:
        return Decision(dead=dict.fromkeys(range(count), reason))
    middle = count // 2
    return Decision(resend=(tuple(range(middle)), tuple(range(middle, count))))


def is_index(value: Any, count: int) -> bool:
    """Return whether a value from an answer is the index of one of `count` events."""
    return type(value) is int and 0 <= value < count


def read_text(value: Any) -> str:
    """Return a text from an answer on one line, cut short; empty for any other value."""
    text = value[:_MAX_REASON_CHARACTERS] if isinstance(value, str) else ""
    return "".join(character if character.isprintable() else " " for character in text)


def _parse_date(text: str) -> datetime:
    date = parsedate_to_datetime(text)
    return date if date.tzinfo else date.replace(tzinfo=UTC)
