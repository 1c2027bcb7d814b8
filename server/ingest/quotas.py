"""Quotas of projects: a worker takes events of them in blocks, and spends those in memory.

A block is taken from a row that the workers of all machines share, in a thread of its own; the
next one is taken once half of it is spent. If the row says that too few are left, requests are
refused from memory, and the row is asked again now and then. What is not spent goes back: if it
lies idle, at the end of its period, and when the worker stops.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress

from server.deadline import Deadline
from server.errors import Unavailable
from server.ingest.limits import Allowance
from server.ingest.quota_account import Account, Choice, Grant, choose
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict
from server.storage.quotas import (
    NEAR_END,
    Change,
    Standing,
    give_back_events,
    lock_standings,
    take_events,
)
from server.wakeups import gathered_wakeups

# How long a block may lie idle.
_IDLE_SECONDS = 10.0
_QUERY_SECONDS = 3.0
# Of requests that wait for a block, at most so many bytes.
_MAX_WAITING_BYTES = 16 << 20
# A request that waits for a block is answered this long before its deadline.
_MARGIN_SECONDS, _MARGIN_SHARE = 0.25, 0.25

_UNAVAILABLE = "storage is unavailable"

_log = logging.getLogger("productgraph.quotas")


class Quotas(DatabaseThread):
    """Counts the events of projects that have a quota. Does nothing while none has."""

    STOP_SECONDS = _QUERY_SECONDS

    def __init__(
        self, connection: GuardedConnection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__("quotas", connection)
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._waiting: list[Grant] = []
        self._waiting_bytes = 0
        self._in_flight: list[Grant] = []
        self._low: set[Account] = set()
        self._look_at = -math.inf
        self._available = True

    def check_left(self, project_id: str) -> None:
        """Raise ResourceExhausted if it is known that nothing is left of a project's quota."""
        account = self._accounts.get(project_id)
        if account is not None and not account.left:
            account.was_asked = True
            if error := account.refuse(1, self._clock()):
                raise error

    def allowances_of(self, project_id: str) -> list[Allowance]:
        """Return what a project may still send; empty if this worker does not know it yet."""
        account = self._accounts.get(project_id)
        return [] if account is None else account.measure(self._clock())

    def take(self, project_id: str, count: int, size: int, deadline: Deadline) -> Grant:
        """Take the events of a request of `size` bytes from its project's quota.

        If this worker has too few, the request has to wait for the grant, which fails with
        ResourceExhausted or, by the deadline, Unavailable. Raises either at once if it is known.
        """
        with self._changed:
            account = self._accounts.get(project_id)
            if account is None:
                account = self._accounts[project_id] = Account(project_id)
            account.was_asked, now = True, self._clock()
            if error := account.refuse(count, now):
                raise error
            grant = Grant(account, count, self._take_back)
            if account.has(count, now):
                account.spend(grant)
                self._keep_ahead(account)
            else:
                self._await(grant, size, deadline)
            return grant

    def _keep_ahead(self, account: Account) -> None:
        if self._available and not account.is_ahead and account.is_low():
            account.is_ahead = True
            self._low.add(account)
            self._changed.notify()

    def _await(self, grant: Grant, size: int, deadline: Deadline) -> None:
        if not self._available or self._stopping.is_set():
            raise Unavailable(_UNAVAILABLE)
        if self._waiting_bytes + size > _MAX_WAITING_BYTES:
            raise Unavailable("too many events are waiting to be stored")
        margin = min(_MARGIN_SECONDS, _MARGIN_SHARE * deadline.left())
        deadline.check(margin)
        grant.granted, grant.size = Future(), size
        grant.answer_by = deadline.at - margin
        grant.account.waiting.add(grant)
        self._waiting.append(grant)
        self._waiting_bytes += size
        self._changed.notify()

    def _take_back(self, grant: Grant) -> None:
        with self._changed:
            grant.account.take_back(grant)

    def check(self) -> None:
        """For the watchdog: answer those whose time is up, and cut a query that hangs."""
        if self._waiting or self._in_flight:
            now = self._clock()
            with self._changed:
                waiting = [*self._waiting, *self._in_flight]
            _settle((grant for grant in waiting if now >= grant.answer_by), "not answered in time")
        super().check()

    def _note_cut(self) -> None:
        self._fail()

    def _has_work(self) -> bool:
        return bool(self._waiting)

    def _run_round(self) -> float:
        waiting, accounts, given_up = self._wait_for_work()
        try:
            if accounts:
                given_up += self._serve(waiting, accounts)
            if given_up:
                self._give_back(given_up)
        except (Conflict, Unavailable) as error:
            _log.debug("no quota can be taken", exc_info=error.__cause__)
            self._fail(is_available=isinstance(error, Conflict))
        except Exception:  # noqa: BLE001 - whatever happens, those who wait are answered
            _log.exception("no quota can be taken")
            self._fail(is_available=True)
        if not self._available:
            self._available = self._connection.wait_until_available(self._stopping)
        if not self._accounts:
            self._connection.close()
        return 0.0

    def _finish(self) -> None:
        self._fail()
        with self._changed:
            given_up = [each for account in self._accounts.values() for each in account.give_up()]
        if given_up:
            with suppress(Conflict, Unavailable):
                self._give_back(given_up)

    def _wait_for_work(self) -> tuple[list[Grant], set[Account], list[Change]]:
        """Return who waits, the accounts that need a block, and what goes back."""
        with self._changed:
            pause = max(0.0, self._look_at - self._clock()) if self._accounts else None
            self._changed.wait_for(self._is_due, pause)
            for grant in self._waiting:
                if grant.is_answered():
                    grant.account.waiting.discard(grant)
            waiting = [grant for grant in self._waiting if not grant.is_answered()]
            self._in_flight, self._waiting, self._waiting_bytes = waiting, [], 0
            accounts, self._low = {grant.account for grant in waiting} | self._low, set()
            return waiting, accounts, self._look()

    def _is_due(self) -> bool:
        is_asked = bool(self._waiting or self._low)
        return is_asked or self._stopping.is_set() or not self._available

    def _look(self) -> list[Change]:
        """Give up blocks that lie idle, and forget projects that send nothing."""
        if self._clock() < self._look_at:
            return []
        self._look_at = self._clock() + _IDLE_SECONDS
        given_up: list[Change] = []
        for account in tuple(self._accounts.values()):
            if account.left and not (account.has_spent or account.waiting):
                given_up += account.give_up()
                account.asked_at = -math.inf
            elif not (account.left or account.was_asked or account.waiting):
                del self._accounts[account.project_id]
            account.has_spent = account.was_asked = False
        return given_up

    def _serve(self, waiting: Sequence[Grant], accounts: set[Account]) -> list[Change]:
        """Take blocks, and answer those who wait; return what is left of earlier periods."""
        asked_at = self._clock()
        with self._connection.connected(_QUERY_SECONDS) as connection:
            found = lock_standings(connection, {each.project_id for each in accounts})
            choices = {
                account: _choose_for(account, found.get(account.project_id, []), waiting)
                for account in accounts
            }
            changes = list(_list_changes(found, choices))
            if changes:
                take_events(connection, changes)
        for change in changes:
            if change.warned_for is not None:
                _warn(change, found)
        given_up, answers = self._apply(choices, found, asked_at, waiting)
        with gathered_wakeups():
            for grant, error in answers:
                grant.settle(error)
        return given_up

    def _apply(
        self,
        choices: Mapping[Account, Choice],
        found: Mapping[str, Sequence[Standing]],
        asked_at: float,
        waiting: Sequence[Grant],
    ) -> tuple[list[Change], list[tuple[Grant, Exception | None]]]:
        given_up: list[Change] = []
        answers: list[tuple[Grant, Exception | None]] = []
        with self._changed:
            self._in_flight = []
            for account, (taken, served) in choices.items():
                standings = [
                    each._replace(used=each.used + taken)
                    for each in found.get(account.project_id, [])
                ]
                given_up += account.renew(standings, asked_at)
                account.left += taken
                account.is_ahead = False
                for grant in served:
                    account.spend(grant)
            for grant in waiting:
                grant.account.waiting.discard(grant)
                is_served = grant in choices[grant.account].served
                answers.append((grant, None if is_served else self._refuse(grant)))
        return given_up, answers

    def _refuse(self, grant: Grant) -> Exception:
        error = grant.account.explain(grant.count, self._clock())
        return error or Unavailable(_UNAVAILABLE)  # another one has just returned its events

    def _give_back(self, changes: Sequence[Change]) -> None:
        """Give events back to the database; if that fails, they count as used."""
        with self._connection.connected(_QUERY_SECONDS) as connection:
            give_back_events(connection, changes)

    def _fail(self, *, is_available: bool = False) -> None:
        """Answer all who wait, and whoever comes until the database is back."""
        with self._changed:
            self._available = is_available
            failed = [*self._in_flight, *self._waiting]
            self._in_flight, self._waiting, self._waiting_bytes = [], [], 0
            for grant in failed:
                grant.account.waiting.discard(grant)
            for account in self._accounts.values():
                account.is_ahead = False
            self._changed.notify()
        _settle(failed, _UNAVAILABLE)


def _choose_for(
    account: Account, standings: Sequence[Standing], waiting: Sequence[Grant]
) -> Choice:
    own = [grant for grant in waiting if grant.account is account]
    return choose(standings, account.left if account.is_in(standings) else 0, own)


def _list_changes(
    found: Mapping[str, Sequence[Standing]], choices: Mapping[Account, Choice]
) -> Iterator[Change]:
    """Yield what is taken of each quota, with a warning the first time that it is near its end."""
    for account, choice in choices.items():
        for each in found.get(account.project_id, []):
            is_near = each.used + choice.taken >= NEAR_END * each.events
            warned_for = each.events if is_near and each.warned_for != each.events else None
            if choice.taken or warned_for is not None:
                yield Change(account.project_id, each.period, each.began, choice.taken, warned_for)


def _warn(change: Change, found: Mapping[str, Sequence[Standing]]) -> None:
    [standing] = [each for each in found[change.project_id] if each.period == change.period]
    fields = {
        "project": change.project_id,
        "period": change.period,
        "used": standing.used + change.events,
        "quota": standing.events,
    }
    _log.warning("a quota is near its end", extra=fields)


def _settle(grants: Iterable[Grant], problem: str) -> None:
    with gathered_wakeups():
        for grant in grants:
            grant.settle(Unavailable(problem))
