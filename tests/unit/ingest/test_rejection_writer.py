"""Rejected events are written when they can be, and no more of them are kept than is allowed."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from productgraph.v1.event_ingestion_service_pb2 import EventError
from server.config import RejectedKeep
from server.events.batch import ParsedBatch
from server.ingest.rejection_writer import MAX_WAITING, RejectionWriter
from server.storage.connection import Engine, GuardedConnection, connected, open_engine
from server.storage.health import Watchdog
from server.storage.rejected_events import (
    Rejection,
    delete_surplus,
    group_newest_rejections,
    insert_rejections,
    list_rejections,
)
from tests.support.database import WAITING_LOCKS
from tests.support.services import query, wait_until

KEEP = RejectedKeep(100_000, 3600.0)
COUNT = "SELECT project_id, count(*) FROM rejected_events GROUP BY 1 ORDER BY 1"


@pytest.fixture
def engine(create_migrated: Callable[[], str]) -> Engine:
    """How the service connects to a fresh database."""
    return open_engine(create_migrated())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rounds follow each other faster than in a service."""
    for name, value in (("_REST", 1), ("_TRIM_SECONDS", 0.05), ("_RETRY_SECONDS", 0.05)):
        monkeypatch.setattr(f"server.ingest.rejection_writer.{name}", value)


def make_writer(engine: Engine, keep: RejectedKeep = KEEP) -> RejectionWriter:
    """Return a writer that is not started yet."""
    return RejectionWriter(GuardedConnection(engine), keep)


@contextmanager
def running(writer: RejectionWriter) -> Iterator[None]:
    """Let the writer work while the context lasts."""
    with Watchdog(writer.check), writer:
        yield


def record(writer: RejectionWriter, project_id: str, count: int, first: int = 0) -> None:
    """Hands over so many events, numbered in their content."""
    contents = [str(number).encode() for number in range(first, first + count)]
    errors = [EventError(index=index, error="wrong") for index in range(count)]
    writer.record(project_id, ParsedBatch("http", count, 0, iter(()), contents.__getitem__), errors)


def insert(engine: Engine, project_id: str, count: int, age: timedelta = timedelta(0)) -> None:
    """Add rows of this age."""
    moment = datetime.now(UTC) - age
    with connected(engine) as connection:
        rows = [Rejection(project_id, moment, "http", "wrong", 1, b"x")] * count
        insert_rejections(connection, rows)


def test_the_newest_rejections_of_each_project_are_kept(engine: Engine) -> None:
    """Of each project the newest are kept, as many as allowed, whatever others have."""
    writer = make_writer(engine, RejectedKeep(20, 3600.0))
    with running(writer):
        record(writer, "a", 1200)
        record(writer, "b", 7)
        wait_until(lambda: query(engine, COUNT) == [("a", 20), ("b", 7)])
        record(writer, "a", 5, first=1200)
        kept = "SELECT convert_from(event, 'UTF8')::int FROM rejected_events WHERE project_id = 'a'"
        wanted = [(number,) for number in range(1185, 1205)]
        wait_until(lambda: query(engine, f"{kept} ORDER BY id") == wanted)


def insert_in_turn(engine: Engine, *ages: int) -> None:
    """Add rows one by one, each so many seconds old, which is its reason too."""
    now = datetime.now(UTC)
    with connected(engine) as connection:
        for age in ages:
            moment = now - timedelta(seconds=age)
            row = Rejection("a", moment, "http", f"of {age}", 1, b"x")
            insert_rejections(connection, [row])


def test_rejections_are_told_by_time_not_number(engine: Engine) -> None:
    """The newest are those that came last: each node of Citus numbers rows by itself."""
    insert_in_turn(engine, 5, 1, 30, 9)
    with connected(engine) as connection:
        listed = list_rejections(connection, "a", 3)
        assert [each.reason for each in listed] == ["of 1", "of 5", "of 9"]
        [group] = group_newest_rejections(connection, 3, 1)
        assert group.reason == "of 1"
        assert group.newest_ids == [each.id for each in listed]
        connection.commit()
        assert delete_surplus(connection, "a", 2) == 2
        assert [each.reason for each in list_rejections(connection, None, 9)] == ["of 1", "of 5"]


def test_what_waits_too_long_is_never_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has waited for longer than is said is dropped, so that nothing comes after that."""
    monkeypatch.setattr("server.ingest.rejection_writer._LONGEST_WAIT", timedelta(seconds=1))
    dropped: list[int] = []
    writer = RejectionWriter(GuardedConnection(engine), KEEP, on_dropped=dropped.append)
    record(writer, "a", 3)
    time.sleep(1.1)
    record(writer, "a", 2)
    with running(writer):
        wait_until(lambda: query(engine, COUNT) == [("a", 2)])
        wait_until(lambda: sum(dropped) == 3)


def test_a_smaller_setting_trims_silent_projects_too(engine: Engine) -> None:
    """A service that is to keep less than before trims projects that send nothing any more."""
    insert(engine, "a", 2500)
    with running(make_writer(engine, RejectedKeep(20, 3600.0))):
        wait_until(lambda: query(engine, COUNT) == [("a", 20)])


def test_rejections_expire_without_new_ones(engine: Engine) -> None:
    """What is older than allowed goes, also without anything new."""
    insert(engine, "a", 1500, timedelta(seconds=3601))
    insert(engine, "a", 3)
    with running(make_writer(engine)):
        wait_until(lambda: query(engine, COUNT) == [("a", 3)])


def test_services_trim_at_once_without_conflict(engine: Engine) -> None:
    """Several services that write and trim at the same moment do not get in each other's way."""
    insert(engine, "a", 5000)
    writers = [make_writer(engine, RejectedKeep(10, 3600.0)) for _ in range(3)]
    with running(writers[0]), running(writers[1]), running(writers[2]):
        for number, writer in enumerate(writers):
            record(writer, "a", 1000)
            record(writer, f"b{number}", 10)
        counts = [("a", 10), ("b0", 10), ("b1", 10), ("b2", 10)]
        wait_until(lambda: query(engine, COUNT) == counts)


def test_a_flood_of_rejections_leaves_room_for_others(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A project that floods the queue leaves room for others, and what is dropped is counted."""
    writer = make_writer(engine)
    for _ in range(0, MAX_WAITING, 1000):
        record(writer, "flood", 1000)
    record(writer, "other", 10)
    with running(writer):
        counts = [("flood", MAX_WAITING // 2), ("other", 10)]
        wait_until(lambda: query(engine, COUNT) == counts)
        record(writer, "flood", 1)
        wait_until(lambda: query(engine, COUNT)[0] == ("flood", MAX_WAITING // 2 + 1))
    [line] = [line for line in caplog.records if "too many" in line.message]
    assert (line.levelno, vars(line)["count"]) == (logging.WARNING, MAX_WAITING // 2)


def test_one_projects_large_rejections_leave_room_for_others(engine: Engine) -> None:
    """The bytes of one project's rejected events leave half of the backlog to the others."""
    writer = make_writer(engine)
    large, errors = b"x" * 100_000, [EventError(index=0, error="wrong")] * 300
    for project_id in ("flood", "other"):
        batch = ParsedBatch("http", 300, 0, iter(()), lambda _: large)
        writer.record(project_id, batch, errors[: 300 if project_id == "flood" else 50])
    with running(writer):
        wait_until(lambda: query(engine, COUNT) == [("flood", 84), ("other", 50)])


def test_waiting_rejections_are_limited_in_bytes(engine: Engine) -> None:
    """What waits is limited in bytes too."""
    writer = make_writer(engine)
    errors = [EventError(index=index, error="wrong") for index in range(1000)]
    batch = ParsedBatch("http", 1, 0, iter(()), lambda _: b"x" * 110_000)
    writer.record("a", batch, errors)
    with running(writer):
        wait_until(lambda: query(engine, COUNT) == [("a", (8 << 20) // 102_400 + 1)])


def test_rejections_wait_until_the_table_is_writable(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the table cannot be written, events wait; they are kept once it can be."""
    monkeypatch.setattr("server.ingest.rejection_writer._QUERY_SECONDS", 0.3)
    writer = make_writer(engine)
    with running(writer):
        with connected(engine) as other, other.begin():
            other.execute(text("LOCK TABLE rejected_events IN ACCESS EXCLUSIVE MODE"))
            record(writer, "a", 700)
            record(writer, "b", 1)
            wait_until(lambda: query(engine, f"SELECT 1 FROM {WAITING_LOCKS}"))
            time.sleep(0.5)
        wait_until(lambda: query(engine, COUNT) == [("a", 700), ("b", 1)])


def test_a_refused_batch_is_logged_and_dropped(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """What the database refuses is logged and given up, and what follows is kept."""
    writer = make_writer(engine)
    record(writer, "a\0b", 1)
    with running(writer):
        wait_until(lambda: "rejected events were not kept" in caplog.text)
        record(writer, "c", 1)
        wait_until(lambda: query(engine, COUNT) == [("c", 1)])
