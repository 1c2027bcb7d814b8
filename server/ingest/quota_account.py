"""A worker's part of a project's quota, and how requests get theirs. All in memory."""

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import NamedTuple

from server.errors import ResourceExhausted
from server.ingest.limits import Allowance
from server.storage.quotas import Change, Standing

# A block is a five-hundredth of a quota, or 100 events if that is more; near the end, an eighth
# of what is left, so that the last events are not in the hands of a worker that needs none.
_BLOCK_SHARE, _BLOCK_EVENTS, _END_SHARE = 500, 100, 8
# How long the database's word is believed.
BELIEVED_SECONDS = 10.0


class Account:
    """The quota of a project in one worker. Not for several threads at once."""

    def __init__(self, project_id: str) -> None:
        self.project_id = project_id
        self.standings: Sequence[Standing] = ()
        self.left = 0  # taken from the database, and not spent
        self.asked_at = self.ends_at = -math.inf
        self.term = 0  # how often another period has begun
        # Who waits for a block; others must not overtake them.
        self.waiting: set[Grant] = set()
        self.is_ahead = False  # a block is taken that nobody waits for
        self._low_below = 0  # when to do that
        # Since somebody looked at last.
        self.has_spent = self.was_asked = True

    def has(self, count: int, now: float) -> bool:
        """Return whether `count` events may be spent at once."""
        if not self.standings:  # the quota was removed
            return now < self.ends_at
        return now < self.ends_at and not self.waiting and count <= self.left

    def spend(self, grant: "Grant") -> None:
        """Give a request what it asks for."""
        if self.standings:
            self.left -= grant.count
            self.has_spent = True
            grant.taken, grant.term = grant.count, self.term

    def take_back(self, grant: "Grant") -> None:
        """Take back what a request was given in this period."""
        if grant.term == self.term:
            self.left += grant.taken
        grant.taken = 0

    def refuse(self, count: int, now: float) -> ResourceExhausted | None:
        """Return the error for a request that is known to ask for too much."""
        if self.waiting or now >= min(self.ends_at, self.asked_at + BELIEVED_SECONDS):
            return None
        return self.explain(count, now)

    def explain(self, count: int, now: float) -> ResourceExhausted | None:
        """Return the error for a request of more than the database had left, if it was more."""
        short = [each for each in self.standings if each.left < count - self.left]
        if not short:
            return None
        last = max(short, key=lambda each: each.ends_in)
        text = f"{last.period} quota exceeded: {last.events} events"
        return ResourceExhausted(text, self._seconds_to_end(last, now))

    def measure(self, now: float) -> list[Allowance]:
        """Return what may still be sent, as far as this worker knows."""
        return [
            Allowance(
                each.period,
                "events",
                each.events,
                each.seconds,
                each.left + self.left,
                self._seconds_to_end(each, now),
            )
            for each in self.standings
            if now < self.ends_at
        ]

    def _seconds_to_end(self, standing: Standing, now: float) -> int:
        return max(1, math.ceil(self.asked_at + standing.ends_in - now))

    def is_low(self) -> bool:
        """Return whether it is time to take the next block."""
        return self.left < self._low_below

    def give_up(self) -> list[Change]:
        """Let go of what is left, and return it as what the database gets back."""
        if self.left <= 0:
            return []
        left, self.left = self.left, 0
        return [Change(self.project_id, each.period, each.began, left) for each in self.standings]

    def is_in(self, standings: Sequence[Standing]) -> bool:
        """Return whether its periods still go on."""
        own, others = (
            [(each.period, each.began) for each in one] for one in (self.standings, standings)
        )
        return own == others

    def renew(self, standings: Sequence[Standing], asked_at: float) -> list[Change]:
        """Take note of what the database says; return what is left of an earlier period."""
        given_up: list[Change] = []
        if not self.is_in(standings):
            given_up = self.give_up()
            self.term += 1
        ends_in = min((each.ends_in for each in standings), default=BELIEVED_SECONDS)
        self.standings, self.asked_at, self.ends_at = standings, asked_at, asked_at + ends_in
        self._low_below = _size_block(standings) // 2
        return given_up


@dataclass(slots=True, eq=False)
class Grant:
    """The events of a request, which it has got at once, or gets when `granted` is done.

    `on_return` takes the grant once its events are not needed.
    """

    account: Account
    count: int
    on_return: Callable[["Grant"], None]
    size: int = 0
    answer_by: float = math.inf
    granted: Future[None] | None = None
    taken: int = field(default=0, init=False)
    term: int = field(default=0, init=False)

    def follow(self, stored: "Future[None]") -> None:
        """Return the events if they cannot be stored."""
        stored.add_done_callback(lambda done: self.withdraw() if done.exception() else None)

    def withdraw(self) -> None:
        """Return the events, or do not wait for them any more."""
        if self.granted is not None:
            self.granted.cancel()
        self.on_return(self)

    def is_answered(self) -> bool:
        """Return whether it has to wait no more."""
        return self.granted is None or self.granted.done()

    def settle(self, error: Exception | None) -> None:
        """Answer a request that waits; if it has been answered, its events are returned."""
        assert self.granted is not None
        try:
            if error is None:
                self.granted.set_result(None)
            else:
                self.granted.set_exception(error)
        except InvalidStateError:
            if error is None:
                self.on_return(self)


class Choice(NamedTuple):
    """The number of events to take from the database, and the grants that are served."""

    taken: int
    served: Collection[Grant]


def choose(standings: Sequence[Standing], left: int, waiting: Sequence[Grant]) -> Choice:
    """Serve those who wait, one after the other, and take a block beyond what they need.

    `left` is what the worker still has. Without a quota, everybody is served and nothing taken.
    """
    if not standings:
        return Choice(0, waiting)
    available = min(each.left for each in standings)
    served, total = [], 0
    for grant in waiting:
        if total + grant.count <= left + available:
            served.append(grant)
            total += grant.count
    need = max(0, total - left)
    rest = left + need - total
    return Choice(need + max(0, _size_block(standings, need) - rest), served)


def _size_block(standings: Sequence[Standing], need: int = 0) -> int:
    """Return the size of the next block, once `need` events are taken besides."""
    if not standings:
        return 0
    usual = max(_BLOCK_EVENTS, min(each.events for each in standings) // _BLOCK_SHARE)
    available = min(each.left for each in standings) - need
    return min(usual, math.ceil(available / _END_SHARE))
