"""Counts of several processes become one number for each series."""

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.counting import (
    MAX_PROJECTS,
    OTHER_PROJECTS,
    PROJECT,
    Counts,
    Kind,
    Metric,
    Report,
    Totals,
)

REQUESTS = Metric(Kind.COUNTER, "requests", "Requests.", ("status",), known=(("202",),))
SECONDS = Metric(Kind.HISTOGRAM, "seconds", "Seconds.", (), (0.5, 1.0, 2.0), ((),))
WAITING = Metric(Kind.GAUGE, "waiting", "Waiting.", known=((),))
METRICS = (REQUESTS, SECONDS, WAITING)
SECONDS_LISTS = st.lists(st.floats(0, 3).map(lambda seconds: round(seconds, 2)))


def read(totals: Totals) -> dict[str, dict[tuple[str, ...], list[float]]]:
    """Return the numbers by the names of their metrics."""
    return {metric.name: sums for metric, sums in totals.read()}


def deliver(report: Report, totals: Totals) -> None:
    """Carry a report over in its messages."""
    for message in report.encode():
        totals.add(Report.decode(message))


def test_declared_series_are_there_from_the_start() -> None:
    """A series that is known beforehand is on the page with zeros."""
    assert read(Totals(METRICS, Counts())) == {
        "requests": {("202",): [0]},
        "seconds": {(): [0, 0, 0, 0, 0]},
        "waiting": {(): [0]},
    }


@given(batches=st.lists(SECONDS_LISTS))
def test_histogram_is_that_of_all_amounts(batches: list[list[float]]) -> None:
    """However amounts are spread over reports, each is in the bucket of the next bound."""
    counts, totals = Counts(), Totals(METRICS, Counts())
    for amounts in batches:
        counts.observe(SECONDS, amounts)
        deliver(counts.take(), totals)
    amounts = [amount for batch in batches for amount in batch]
    buckets = [bisect_left(SECONDS.bounds, amount) for amount in amounts]
    *found, total = read(totals)["seconds"][()]
    assert found == [buckets.count(number) for number in range(4)]
    assert total == pytest.approx(sum(amounts))


def test_counters_of_processes_add_up_and_stay() -> None:
    """What a process has counted stays when it is gone, what it shows does not."""
    totals = Totals(METRICS, Counts())
    for process in (1, 2, 1):
        totals.add(Report(process, {("requests", "202"): [2]}, {("waiting",): process}))
    assert read(totals)["requests"] == {("202",): [6]}
    assert read(totals)["waiting"] == {(): [3]}
    totals.forget(1)
    totals.forget(3)
    assert read(totals)["requests"] == {("202",): [6]}
    assert read(totals)["waiting"] == {(): [2]}


def test_own_counts_need_no_report() -> None:
    """What the process of the page counts is on it at once."""
    own = Counts()
    totals = Totals(METRICS, own)
    own.add(REQUESTS, 1, "503")
    own.set(WAITING, 7)
    for _ in range(2):
        assert read(totals)["requests"] == {("202",): [0], ("503",): [1]}
        assert read(totals)["waiting"] == {(): [7]}


def test_only_changes_are_reported() -> None:
    """Nothing is sent for a process in which nothing happens, and nothing twice."""
    counts = Counts()
    counts.set(WAITING, 3)
    counts.observe(SECONDS, ())
    assert [len(counts.take().encode()) for _ in range(2)] == [1, 0]
    counts.set(WAITING, 3)
    assert counts.take().encode() == []


def test_counting_messages_are_bounded_in_size() -> None:
    """Many series of long names are split into messages that a socket takes, and none is lost."""
    counts, totals = Counts(), Totals(METRICS, Counts())
    names = [f"{number}{chr(1) * 255}" for number in range(1000)]
    for name in names:
        counts.add(REQUESTS, 1, name)
    messages = counts.take().encode()
    assert len(messages) > 1
    assert max(map(len, messages)) < 100_000
    for message in messages:
        totals.add(Report.decode(message))
    assert read(totals)["requests"] == {("202",): [0]} | {(name,): [1] for name in names}


@pytest.mark.parametrize(
    ("series", "numbers"),
    [
        (("newer",), [1]),
        (("requests",), [1]),
        (("requests", "202", "http"), [1]),
        (("seconds",), [1, 2]),
    ],
    ids=str,
)
def test_undeclared_series_are_left_out(series: tuple[str, ...], numbers: list[float]) -> None:
    """A worker of a newer version, started by a rolling restart, does not break the page."""
    totals = Totals(METRICS, Counts())
    before = read(totals)
    totals.add(Report(1, {series: numbers, ("requests", "202"): [1]}, {("newer",): 1}))
    assert read(totals) == before | {"requests": {("202",): [1]}}


def test_only_so_many_projects_have_series() -> None:
    """The first projects of all processes keep their series, all others are one."""
    events = Metric(Kind.COUNTER, "events", "Events.", (PROJECT,))
    bad = Metric(Kind.COUNTER, "bad", "Bad events.", (PROJECT, "reason"))
    totals = Totals((events, bad), Counts())
    projects = [f"proj_{number}" for number in range(MAX_PROJECTS + 50)]
    for process in (1, 2):
        totals.add(Report(process, {("events", project): [1] for project in projects}, {}))
    totals.add(Report(1, {("bad", projects[0], "a"): [1], ("bad", projects[-1], "a"): [1]}, {}))
    found = read(totals)
    named = {(project,): [2] for project in projects[:MAX_PROJECTS]}
    assert found["events"] == named | {(OTHER_PROJECTS,): [100]}
    assert found["bad"] == {(projects[0], "a"): [1], (OTHER_PROJECTS, "a"): [1]}
