"""Quotas: workers take blocks from one row, spend them in memory, and refuse from memory."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import date
from itertools import count
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from server.caller import Caller, Quota
from server.deadline import NEVER, Deadline
from server.errors import ResourceExhausted, Unavailable
from server.ingest.admission import Admission
from server.ingest.key_cache import KeyCache
from server.ingest.quota_account import Account, Grant, choose
from server.ingest.quotas import Quotas
from server.storage.connection import Engine, GuardedConnection, connected, open_engine
from server.storage.health import Watchdog
from server.storage.keys import create_key, digest_key, find_callers
from server.storage.quotas import Change, Standing, list_shares, list_standings, set_quota
from tests.support.clock import Clock
from tests.support.database import noted_statements
from tests.support.services import wait_for, wait_until

NUMBERS = count()
BELIEVED_SECONDS = IDLE_SECONDS = 10
DAY = 86_400


@pytest.fixture
def clock() -> Clock:
    """Return the clock of the workers."""
    return Clock()


@pytest.fixture
def open_worker(engine: Engine, clock: Clock) -> Iterator[Callable[[], Quotas]]:
    """Start the quotas of one worker after the other."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Quotas(GuardedConnection(engine), clock))


@pytest.fixture
def queries(engine: Engine) -> Iterator[list[str]]:
    """Provide the statements about quotas that ran during a test."""
    with noted_statements(engine, "quota") as seen:
        yield seen


def give(engine: Engine, project: str = "", **limits: int) -> str:
    """Give a project a quota, a new one unless it is named; return its id."""
    project = project or f"proj_{next(NUMBERS)}"
    with connected(engine) as connection:
        set_quota(connection, project, Quota(**limits))
    return project


def take(worker: Quotas, project: str, events: int, deadline: Deadline = NEVER) -> bool:
    """Return whether a worker grants a request of so many events; wait for it."""
    try:
        grant = worker.take(project, events, 1, deadline)
        if grant.granted is not None:
            grant.granted.result(60)
    except ResourceExhausted:
        return False
    return True


def read_used(engine: Engine, project: str) -> dict[str, int]:
    """Return what the database counts as used in each period."""
    with connected(engine) as connection:
        return {each.period: each.used for _, each in list_standings(connection, project)}


def wake(worker: Quotas) -> None:
    """Make a worker do whatever it is time for: it does so when it takes a block."""
    assert take(worker, f"nobody_{next(NUMBERS)}", 1)


def test_workers_at_once_grant_a_quota_to_the_last_event(
    engine: Engine, open_worker: Callable[[], Quotas], clock: Clock
) -> None:
    """Workers that take at the same time grant all of a quota, and not one event more."""
    project = give(engine, daily=30_000, monthly=20_000)
    workers = [open_worker() for _ in range(4)]

    def press(worker: Quotas, size: int) -> int:
        granted = 0
        while take(worker, project, size):
            granted += size
        return granted

    with ThreadPoolExecutor() as pool:
        sums = pool.map(press, workers * 2, (1, 7, 50, 300, 20, 20, 90, 5))
    granted = [sum(sums)]
    assert 19_000 <= granted[0] <= 20_000

    def grant_rest() -> bool:
        clock.now += IDLE_SECONDS + 1
        for worker in workers:
            wake(worker)
        granted.append(press(workers[0], 1))
        return sum(granted) >= 20_000

    wait_until(grant_rest)  # what others left goes to the one who still asks
    assert sum(granted) == 20_000
    assert read_used(engine, project) == {"daily": 20_000, "monthly": 20_000}


def test_refusals_from_memory_cost_no_query(
    engine: Engine, open_worker: Callable[[], Quotas], clock: Clock, queries: list[str]
) -> None:
    """Once too few are left, requests are refused without a query, but one every ten seconds."""
    project, worker = give(engine, monthly=10), open_worker()
    assert take(worker, project, 8)
    assert not take(worker, project, 3)
    before = len(queries)
    assert not any(take(worker, project, size) for size in range(3, 1000))
    assert len(queries) == before
    clock.now += BELIEVED_SECONDS
    assert not any(take(worker, project, size) for size in range(3, 1000))
    assert len(queries) == before + 1  # it locks the row, and takes nothing
    assert take(worker, project, 2)
    for _ in range(10):
        with pytest.raises(ResourceExhausted, match="monthly quota exceeded: 10 events"):
            worker.check_left(project)
    assert not take(worker, project, 1)


def test_a_project_without_a_quota_costs_nothing(
    open_worker: Callable[[], Quotas], queries: list[str]
) -> None:
    """Without a quota nothing is counted, and the look-up of a key is the one query."""
    admission = Admission(cast(KeyCache, None), quotas=open_worker())
    caller = Caller(f"proj_{next(NUMBERS)}", 1)
    admission.check_quota(caller)
    assert admission.take_quota(caller, 1000, 1, NEVER) is None
    assert list(admission.allowances_of(caller)) == []
    assert queries == []


def test_a_key_is_found_with_the_quota_of_its_project(engine: Engine, queries: list[str]) -> None:
    """One query finds whose a key is and what the project may send; another project has none."""
    project = give(engine, daily=5)
    with connected(engine) as connection:
        keys = [create_key(connection, name, "test") for name in (project, f"{project}_other")]
        queries.clear()
        found = find_callers(connection, list(map(digest_key, keys)))
    assert [found[digest_key(key)].quota for key in keys] == [Quota(daily=5), None]
    assert len(queries) == 1


def test_a_stopped_worker_gives_back_what_it_has_left(engine: Engine, clock: Clock) -> None:
    """After an orderly stop, what was spent counts as used, and nothing else."""
    project = give(engine, daily=100_000, monthly=1_000_000)
    with Quotas(GuardedConnection(engine), clock) as worker:
        for size in (1, 20, 300, 1000):
            assert take(worker, project, size)
        assert read_used(engine, project)["daily"] > 1321
    assert read_used(engine, project) == {"daily": 1321, "monthly": 1321}


def test_events_that_are_not_stored_use_no_quota(
    engine: Engine, open_worker: Callable[[], Quotas]
) -> None:
    """What a request has taken is given back if it fails, also if it waits for its grant."""
    project, worker = give(engine, daily=10), open_worker()
    for _ in range(3):
        grant = worker.take(project, 10, 1, NEVER)
        if grant.granted is not None:
            grant.granted.result(60)
        stored: Future[None] = Future()
        grant.follow(stored)
        assert not take(worker, project, 10)
        stored.set_exception(Unavailable("not stored in time"))
    worker.take(f"{project}_other", 10, 1, NEVER).withdraw()
    assert take(worker, project, 10)
    assert read_used(engine, project) == {"daily": 10}


def test_what_a_period_leaves_is_not_spent_in_the_next() -> None:
    """When a day ends, what is left of it goes back to it and to its month, and is not spent."""

    def stand(day: int) -> list[Standing]:
        month, today = date(2026, 1, 1), date(2026, 1, day)
        return [
            Standing("daily", 500, today, DAY, 60.0, 0, None),
            Standing("monthly", 900, month, 31 * DAY, 9e5, 0, None),
        ]

    account = Account("proj")
    assert account.renew(stand(7), 0.0) == []
    account.left = 50
    grant = Grant(account, 20, account.take_back)
    assert [account.has(20, now) for now in (0.0, 59.0, 60.0)] == [True, True, False]
    account.spend(grant)
    assert account.renew(stand(8), 60.0) == [
        Change("proj", "daily", date(2026, 1, 7), 30),
        Change("proj", "monthly", date(2026, 1, 1), 30),
    ]
    account.take_back(grant)
    assert account.left == 0


def test_a_worker_asks_again_when_a_period_ends(
    engine: Engine, open_worker: Callable[[], Quotas], clock: Clock, queries: list[str]
) -> None:
    """Within a day a worker spends its block without a query; after its end it asks first."""
    project, worker = give(engine, daily=1_000_000), open_worker()
    assert take(worker, project, 1)
    before = len(queries)
    assert all(take(worker, project, 1) for _ in range(100))
    assert len(queries) == before
    clock.now += DAY
    assert take(worker, project, 1)
    assert len(queries) > before


def test_another_quota_takes_effect_within_seconds(
    engine: Engine, open_worker: Callable[[], Quotas], clock: Clock
) -> None:
    """A worker that refuses learns within ten seconds that a quota was raised, or taken away."""
    project, worker = give(engine, daily=5), open_worker()
    for limits, granted in (({"daily": 5}, 5), ({"daily": 2000}, 1995), ({}, 10_000)):
        give(engine, project, **limits)
        clock.now += BELIEVED_SECONDS
        assert take(worker, project, granted)
        assert take(worker, project, 1) is (limits == {})


def test_without_a_database_what_needs_a_block_is_unavailable() -> None:
    """If the database is gone, requests fail as if their events could not be stored."""
    worker = Quotas(GuardedConnection(open_engine("host=127.0.0.1 port=1")))
    with worker:
        for _ in range(3):
            with pytest.raises(Unavailable, match="storage is unavailable"):
                take(worker, "proj", 1)


def test_a_block_that_hangs_fails_its_requests_in_time(engine: Engine) -> None:
    """While no block can be had, what is at hand is spent, and more is Unavailable in time."""
    project = give(engine, daily=800)
    worker = Quotas(GuardedConnection(engine))
    with Watchdog(worker.check), worker, ExitStack() as stack:
        assert take(worker, project, 1)
        holder = stack.enter_context(engine.connect())
        holder.execute(text("LOCK TABLE quota_uses"))
        assert take(worker, project, 1)
        for _ in range(3):
            with pytest.raises(Unavailable):
                take(worker, project, 700, Deadline(time.monotonic() + 0.5))
        holder.rollback()
        wait_until(lambda: is_available(worker, project))
    wait_for(lambda: read_used(engine, project), {"daily": 702})


def is_available(worker: Quotas, project: str) -> bool:
    """Return whether a worker grants a request, for which it needs a block."""
    try:
        return take(worker, project, 700)
    except Unavailable:
        return False


def test_waiting_requests_take_bounded_memory(engine: Engine) -> None:
    """Requests that wait for a block are refused once they hold too much."""
    worker = Quotas(GuardedConnection(engine))
    worker.take("proj", 1, 10 << 20, NEVER)
    with pytest.raises(Unavailable, match="too many events are waiting"):
        worker.take("proj", 1, 10 << 20, NEVER)


def test_a_quota_near_its_end_is_logged_once(
    engine: Engine,
    open_worker: Callable[[], Quotas],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At 80 % there is one line for all workers, and another one if the quota is raised."""
    project, workers = give(engine, daily=1000), [open_worker() for _ in range(3)]
    with caplog.at_level(logging.WARNING, "productgraph.quotas"):
        assert all(take(workers[0], project, 10) for _ in range(65))
        assert caplog.records == []
        for events in (1000, 1100):
            give(engine, project, daily=events)
            clock.now += BELIEVED_SECONDS
            for worker in workers * 100:
                take(worker, project, 10)
    fields = ("message", "project", "period", "quota")
    lines = [[getattr(record, name) for name in fields] for record in caplog.records]
    said = "a quota is near its end"
    assert lines == [[said, project, "daily", events] for events in (1000, 1100)]


def test_the_share_of_each_quota_that_is_used_is_known(
    engine: Engine, open_worker: Callable[[], Quotas]
) -> None:
    """Whoever watches is told how much of each quota is used, the most used ones first."""
    project, idle = give(engine, daily=1000, monthly=2000), give(engine, daily=1)
    worker = open_worker()
    assert take(worker, project, 500)
    worker.stop()
    with connected(engine) as connection:
        shares = [each for each in list_shares(connection) if each.project_id in (project, idle)]
    assert shares == [
        (project, "daily", 0.5),
        (project, "monthly", 0.25),
        (idle, "daily", 0.0),
    ]


sizes = st.integers(1, 1000)


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 2000), st.lists(sizes))
def test_no_more_is_shared_out_than_there_is(
    events: int, used: int, left: int, counts: list[int]
) -> None:
    """Whoever waits is served in turn if enough is left; no more is taken than there is."""
    standing = Standing("daily", events, date(2026, 1, 1), DAY, 1.0, used, None)
    account = Account("proj")
    waiting = [Grant(account, number, account.take_back) for number in counts]
    taken, served = choose([standing], left, waiting)
    assert 0 <= taken <= standing.left
    total = 0
    for grant in waiting:
        fits = total + grant.count <= left + standing.left
        assert fits is (grant in served)
        total += grant.count if fits else 0
    assert total <= left + taken
    assert choose([], left, waiting) == (0, waiting)
