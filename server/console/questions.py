"""The console's questions to the database. Each is a value: equal questions share an answer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, ClassVar, Protocol

from server.events.spelling import spell_event
from server.storage.connection import Connection
from server.storage.errors import DatabaseError
from server.storage.event_queries import EventFilter, EventQueries, StoredEvent
from server.storage.fates import describe_stored, find_fates
from server.storage.keys import list_keys
from server.storage.rejected_events import (
    StoredRejection,
    find_rejections,
    group_newest_rejections,
    read_rejection,
)

# After this, a statement is ended.
STATEMENT_SECONDS = 2.0
# A search for the newest events ends after this, and shows what it has found.
_SEARCH_SECONDS = 1.0
_GROUPED_REJECTIONS = 5000
_MAX_GROUPS = 20
_MAX_KEYS = 200
_MAX_FOUND = 10
_MAX_PROJECTS = 20
# The periods to count, in days: the first that can be counted in time is shown.
_USAGE_DAYS, _USAGE_SECONDS = (7, 1), 1.0

Answer = dict[str, Any]


class NotFound(Exception):
    """There is nothing of that name. The text may be shown to whoever asks."""


class Question(Protocol):
    """A question. Its answer is shared for `rest_seconds` with everybody who asks the same."""

    rest_seconds: ClassVar[float]

    def ask(self, connection: Connection) -> Answer:
        """Ask the database. Raises DatabaseError if that takes too long, or NotFound."""


@dataclass(frozen=True)
class NewestEvents:
    """Which events arrived last, since a moment or at any time in the last `period`.

    `follow` in the answer is the `since` with which nothing is missed that arrives next: an event
    arrives when its transaction begins, and can be seen up to `delay` later.
    """

    wanted: EventFilter
    since: datetime | None
    limit: int
    delay: timedelta
    period: timedelta = timedelta(days=7)
    rest_seconds: ClassVar[float] = 0.5

    def ask(self, connection: Connection) -> Answer:
        """Ask for events, in brief, and say since when all that arrived were looked at."""
        queries = EventQueries(connection, STATEMENT_SECONDS, brief=True)
        now = queries.read_now()
        events, seen_since = self._find(queries, now)
        shown = [{**event.fields, "received_at": event.received_at} for event in events]
        follow = (now - self.delay).replace(microsecond=0)
        return {"events": shown, "until": now, "seen_since": seen_since, "follow": follow}

    def _find(self, queries: EventQueries, now: datetime) -> tuple[list[StoredEvent], datetime]:
        if self.since is not None:
            return queries.find_arrived(self.wanted, self.since, now, self.limit), self.since
        events: list[StoredEvent] = []
        seen_since, deadline = now, monotonic() + _SEARCH_SECONDS
        earliest = now - self.period
        try:
            for found, reached in queries.look_back(self.wanted, now, earliest, self.limit):
                events += found
                seen_since = reached
                if monotonic() >= deadline:
                    break
        except DatabaseError:  # the last look took too long; those before it are good
            pass
        return events, seen_since


@dataclass(frozen=True)
class OneEvent:
    """The fate of the event with an id and a time, or of a few with the id since a time."""

    event_id: str
    project: str | None
    timestamp: datetime | None
    since: datetime
    rest_seconds: ClassVar[float] = 0.5

    def ask(self, connection: Connection) -> Answer:
        """Ask for the stored ones with their fates, and for those that were rejected."""
        queries = EventQueries(connection, STATEMENT_SECONDS)
        stored = self._find(queries)
        with queries.transaction() as opened:
            shown = [describe_stored(event, find_fates(opened, event)) for event in stored]
            rejected = find_rejections(opened, self.event_id, self.project, _MAX_FOUND)
        if not shown and not rejected:
            raise NotFound(
                f"no event {self.event_id!r} with a time of {self.since:%Y-%m-%d %H:%M} UTC or"
                " later, and none that was rejected and kept"
            )
        return {"stored": shown, "rejected": [_describe(rejection) for rejection in rejected]}

    def _find(self, queries: EventQueries) -> list[StoredEvent]:
        if self.project is None or self.timestamp is None:
            return queries.find_by_id(self.event_id, self.project, self.since, _MAX_FOUND)
        event = queries.find_by_key(self.project, self.timestamp, self.event_id)
        return [event] if event else []


@dataclass(frozen=True)
class RejectedEvents:
    """Which reasons the newest rejected events have."""

    rest_seconds: ClassVar[float] = 0.9

    def ask(self, connection: Connection) -> Answer:
        """Ask for groups, the largest first."""
        with EventQueries(connection, STATEMENT_SECONDS).transaction() as opened:
            groups = group_newest_rejections(opened, _GROUPED_REJECTIONS, _MAX_GROUPS)
        return {"of_newest": _GROUPED_REJECTIONS, "groups": groups}


@dataclass(frozen=True)
class RejectedEvent:
    """One rejected event, by its number."""

    number: int
    rest_seconds: ClassVar[float] = 0.5

    def ask(self, connection: Connection) -> Answer:
        """Ask for it, and spell it."""
        with EventQueries(connection, STATEMENT_SECONDS).transaction() as opened:
            rejection = read_rejection(opened, self.number)
        if rejection is None:
            raise NotFound(f"no rejected event {self.number}: it was replayed, or is too old")
        return {"rejected": [_describe(rejection)], "stored": []}


@dataclass(frozen=True)
class Usage:
    """The number of events of each project on the last days (UTC), by their own time."""

    rest_seconds: ClassVar[float] = 30.0

    def ask(self, connection: Connection) -> Answer:
        """Ask for the last seven days, or if that takes too long, for fewer."""
        queries = EventQueries(connection, _USAGE_SECONDS)
        midnight = queries.read_now().replace(hour=0, minute=0, second=0, microsecond=0)
        wanted, tomorrow = EventFilter(), midnight + timedelta(days=1)
        for days in _USAGE_DAYS:
            since = tomorrow - timedelta(days=days)
            with suppress(DatabaseError):
                counts = queries.count(["project", "day"], wanted, since, tomorrow)
                return {"days": days, **_rank(counts, f"{midnight:%Y-%m-%d}")}
        return {"days": 0, "count": 0, "events": 0, "projects": []}


def _rank(counts: Sequence[Mapping[str, Any]], today: str) -> Answer:
    """Return the projects with their events in all and today's, the largest first."""
    whole, current = Counter[str](), Counter[str]()
    for row in counts:
        whole[row["project"]] += row["events"]
        current[row["project"]] += row["events"] if row["day"] == today else 0
    ranked = whole.most_common(_MAX_PROJECTS)
    projects = [{"project": name, "events": n, "today": current[name]} for name, n in ranked]
    return {"count": len(whole), "events": whole.total(), "projects": projects}


@dataclass(frozen=True)
class Keys:
    """Which API keys there are."""

    rest_seconds: ClassVar[float] = 2.0

    def ask(self, connection: Connection) -> Answer:
        """Ask for those that can be used: first those that end soon, then the last used ones."""
        now = datetime.now(UTC)
        with EventQueries(connection, STATEMENT_SECONDS).transaction() as opened:
            keys = [key for key in list_keys(opened) if key.is_valid(now)]
        keys.sort(key=lambda key: key.last_used_at or key.created_at, reverse=True)
        keys.sort(key=lambda key: not key.is_ending(now))
        shown = [{**key.describe(now), "is_ending": key.is_ending(now)} for key in keys[:_MAX_KEYS]]
        ending = sum(key.is_ending(now) for key in keys)
        return {"count": len(keys), "ending": ending, "keys": shown}


def _describe(rejection: StoredRejection) -> Answer:
    text = spell_event(rejection.protocol, rejection.event)
    return {**rejection.summary, "is_cut": rejection.is_cut, "event": text}
