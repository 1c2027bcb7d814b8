"""Buckets let through what their rates say, for all processes together."""

import fcntl
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.caller import Caller
from server.errors import ResourceExhausted
from server.ingest.buckets import SECOND, BucketTable, take
from server.ingest.limits import RateLimiter
from tests.support.services import clean_environment

NOW = 50 * SECOND
TABLE, KEY_IDS = BucketTable(), itertools.count()
GAPS_AND_COSTS = st.lists(st.tuples(st.integers(0, 2 * SECOND), st.integers(0, 3 * SECOND)))


@pytest.mark.parametrize(
    ("full_in", "cost", "taken"),
    [
        (-50 * SECOND, 1, 1),  # full since long ago
        (0, 0, 0),
        (0, SECOND, SECOND),
        (0, 7 * SECOND, 7 * SECOND),  # more than it holds, from a full one
        (1, SECOND - 1, SECOND),
        (1, SECOND, None),
        (1, 7 * SECOND, None),
        (SECOND // 2, SECOND // 2, SECOND),
        (SECOND, 0, SECOND),
        (SECOND, 1, None),
        (7 * SECOND, 0, None),  # still to be made up for
        (6 * SECOND, SECOND, None),
    ],
)
def test_taking_moves_the_moment_a_bucket_is_full(
    full_in: int, cost: int, taken: int | None
) -> None:
    """What is taken moves the moment at which the bucket is full, unless it is too much."""
    assert take(NOW + full_in, NOW, cost) == (None if taken is None else NOW + taken)


@given(GAPS_AND_COSTS)
def test_no_time_yields_more_than_its_rate(requests: list[tuple[int, int]]) -> None:
    """In any time, no more is taken than that time and a bucket, or one large request, make up."""
    full_at, now = 0, NOW
    passed: list[tuple[int, int]] = []
    for gap, cost in requests:
        now += gap
        if (taken := take(full_at, now, cost)) is not None:
            full_at = taken
            passed.append((now, cost))
    for first, (start, _) in enumerate(passed):
        total, largest = 0, SECOND
        for end, cost in passed[first:]:
            total, largest = total + cost, max(largest, cost)
            assert total <= end - start + largest


@given(GAPS_AND_COSTS, st.integers(0, 10 * SECOND))
def test_a_full_bucket_lets_any_size_pass(requests: list[tuple[int, int]], cost: int) -> None:
    """Whatever was taken before, a request of any size passes once the bucket is full."""
    full_at, now = 0, NOW
    for gap, taken_cost in requests:
        now += gap
        full_at = take(full_at, now, taken_cost) or full_at
    assert take(full_at, full_at, cost) == full_at + cost


@given(st.integers(1, 1000), st.integers(0, 20))
def test_constant_demand_gets_all_of_the_rate(rate: int, seconds: int) -> None:
    """Who asks all the time gets all of the rate, and the bucket that was full at first."""
    cost, full_at, passed = SECOND // rate, 0, 0
    for now in range(NOW, NOW + seconds * SECOND + 1, cost):
        while (taken := take(full_at, now, cost)) is not None:
            full_at, passed = taken, passed + 1
    assert passed >= (seconds + 1) * rate - 1


CHARGE = """
import sys
from server.ingest.buckets import BucketTable
table = BucketTable(int(sys.argv[1]), lambda: 0)
print("ready", flush=True)
sys.stdin.readline()
print(sum(table.take(5, 1) for _ in range(20_000)))
"""
# Stops for good in the middle of its turn.
HOLD = """
import signal, sys
from server.ingest.buckets import BucketTable
def stop():
    print("ready", flush=True)
    signal.pause()
BucketTable(int(sys.argv[1]), stop).take(5, 1)
"""


@contextmanager
def running(program: str, table: BucketTable) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has the table, once it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(table.descriptor)],
        env=clean_environment({}),
        pass_fds=[table.descriptor],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_processes_and_threads_share_a_bucket_exactly() -> None:
    """What two processes and two threads take at the same time is taken to the last unit."""
    table = BucketTable(clock=lambda: 0)
    with running(CHARGE, table) as one, running(CHARGE, table) as other, ThreadPoolExecutor() as us:
        processes = [us.submit(process.communicate, "go\n") for process in (one, other)]
        threads = [us.submit(lambda: [table.take(5, 1) for _ in range(10_000)]) for _ in range(2)]
        assert [process.result()[0] for process in processes] == ["20000\n"] * 2
        assert all(all(thread.result()) for thread in threads)
    assert table.seconds_to_full(5) == 60_000 / SECOND


@pytest.mark.parametrize("node", [1, 2, 3, 255])
def test_keys_made_on_other_nodes_have_their_own_buckets(node: int) -> None:
    """Each node of Citus numbers keys from a multiple of 2^48 on, and their limits stay apart."""
    limiter = RateLimiter(BucketTable(clock=lambda: NOW), event_rate=10, byte_rate=10)
    for key_id in (*range(1, 201), *range((node << 48) + 1, (node << 48) + 201)):
        caller = Caller("p", key_id)
        limiter.take_events(caller, 10)
        limiter.take_bytes(caller, 10)


def test_a_killed_process_leaves_its_bucket_usable() -> None:
    """A process that is killed in its turn neither keeps the bucket locked nor changes it."""
    table = BucketTable(clock=lambda: 0)
    with running(HOLD, table) as holder:
        with pytest.raises(BlockingIOError):
            fcntl.lockf(table.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 8, 5 * 8)
        assert table.take(6, 1)  # another bucket is free
        with ThreadPoolExecutor() as us:
            waiting = us.submit(table.take, 5, 2)
            holder.kill()
            assert waiting.result(60)
    assert table.seconds_to_full(5) == 2 / SECOND


def test_numbers_beyond_the_table_share_its_buckets() -> None:
    """A number beyond the table's size shares the bucket of a smaller one."""
    table = BucketTable(clock=lambda: 0)
    assert table.take(BucketTable.SIZE + 3, SECOND)
    assert not table.take(3, 1)
    assert table.take(2, 1)
    os.close(table.descriptor)


@given(st.integers(1024, 10**9), st.integers(0, 3 * 10**9), st.integers(0, 2 * SECOND))
def test_a_request_passes_up_to_its_room(rate: int, sent: int, later: int) -> None:
    """What a caller has room for at a moment may be sent, and more than that is refused."""
    times, caller = [NOW], Caller("proj", next(KEY_IDS))
    table = BucketTable(TABLE.descriptor, clock=lambda: times[-1])
    limiter = RateLimiter(table, event_rate=0, byte_rate=rate)
    limiter.take_bytes(caller, sent)
    times.append(NOW + later)
    room = limiter.find_room(caller)
    if room is None:
        limiter.take_bytes(caller, 100 * rate)
        return
    # As far as nanoseconds tell bytes apart.
    with pytest.raises(ResourceExhausted) as refusal:
        limiter.take_bytes(caller, room + 2)
    assert str(refusal.value) == str(limiter.refuse_bytes(caller))
    if room >= 2:
        limiter.take_bytes(caller, room - 2)
