"""Requests share commits, none waits longer than it may, and none spoils another's."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest

from server.deadline import Deadline
from server.errors import Internal, Unavailable
from server.ingest.group_commit import Writer
from server.storage.connection import Engine, GuardedConnection, open_engine
from server.storage.events import EventStore
from server.storage.health import Watchdog
from server.storage.outages import OutageLog
from server.wakeups import wake
from tests.support.database import WAITING_LOCKS
from tests.support.events import ENCODER, make_row
from tests.support.services import wait_until

POISON = "what the table refuses"
INSERT = """
INSERT INTO events (event_id, project_id, session_id, event_type, event_timestamp)
VALUES (%s, 'deadlock', 'session', 'custom', '2024-01-15T12:00:00Z')
"""
BLOCKED_BY_ROW = f"SELECT 1 FROM {WAITING_LOCKS} WHERE locktype = 'transactionid'"
BLOCKED = f"SELECT 1 FROM {WAITING_LOCKS} WHERE relation = 'events'::regclass"


@pytest.fixture(scope="module")
def url(create_migrated: Callable[[], str]) -> str:
    """Return a database of this module's own, which refuses one event name."""
    url = create_migrated()
    with closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE events ADD CHECK (event_name <> '{POISON}')")
    return url


class Table:
    """The events table as the tests see it."""

    def __init__(self, url: str) -> None:
        self._holder, self._reader = (psycopg2.connect(url) for _ in range(2))
        self._reader.autocommit = True

    @contextmanager
    def transaction(self, statement: str) -> Iterator[psycopg2.extensions.cursor]:
        """Provide a transaction beside the writer's, which begins with this statement."""
        with self._holder, self._holder.cursor() as cursor:
            cursor.execute(statement)
            yield cursor

    def locked(self) -> AbstractContextManager[object]:
        """Nobody else can write events meanwhile."""
        return self.transaction("LOCK TABLE events IN SHARE MODE")

    def query(self, statement: str, *parameters: Any) -> list[Any]:
        """Return the rows of a query."""
        with self._reader.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall()

    def find_events(self, project_id: str) -> set[str]:
        """Return the ids of a project's events."""
        found = self.query("SELECT event_id FROM events WHERE project_id = %s", project_id)
        return {event_id for [event_id] in found}

    def wait_for_writer(self) -> None:
        """Return once somebody waits for the lock."""
        wait_until(lambda: self.query(BLOCKED))

    def close(self) -> None:
        """End its connections."""
        self._holder.close()
        self._reader.close()


@pytest.fixture(scope="module")
def table(url: str) -> Iterator[Table]:
    """Provide the events table."""
    with closing(Table(url)) as table:
        yield table


@pytest.fixture
def writer(engine: Engine) -> Iterator[Writer]:
    """Provide a running writer with its watchdog."""
    with running(make_writer(engine)) as writer:
        yield writer


def make_writer(engine: Engine, **options: Any) -> Writer:
    """Return a writer that was not started."""
    options = {"max_waiting_bytes": 1 << 20} | options
    return Writer(
        GuardedConnection(engine, outages=OutageLog()), EventStore(ENCODER.columns), **options
    )


@contextmanager
def running(writer: Writer) -> Iterator[Writer]:
    """Provide the writer, started and watched."""
    with Watchdog(writer.check), writer:
        yield writer


def submit(
    writer: Writer, project: str, *ids: str, seconds: float = 8.0, **fields: Any
) -> "Future[None]":
    """Hands one request's events in."""
    rows = [make_row(project, event_id, **fields) for event_id in ids]
    return writer.submit(rows, Deadline(time.monotonic() + seconds))


def is_open(writer: Writer, project: str) -> bool:
    """Whether the writer stores an event."""
    try:
        submit(writer, project, "late").result(60)
    except Unavailable:
        return False
    return True


def test_requests_during_a_commit_share_the_next(writer: Writer, table: Table) -> None:
    """All that arrives while a commit is in flight shares the next one."""
    with table.locked():
        stored = [submit(writer, "groups", "first")]
        table.wait_for_writer()
        stored += [submit(writer, "groups", f"e{number}") for number in range(50)]
    for future in stored:
        future.result(60)
    commits = "SELECT count(*) FROM events WHERE project_id = 'groups' GROUP BY received_at"
    assert table.query(f"{commits} ORDER BY 1") == [(1,), (50,)]


def test_a_group_wakes_a_loop_once(writer: Writer, table: Table) -> None:
    """However many requests a commit has stored, the loop that waits is woken once, after all."""
    done: list[str] = []
    stored: list[Future[None]] = []

    def add(project: str) -> None:
        stored.append(submit(writer, project, f"event {len(stored)}"))
        stored[-1].add_done_callback(lambda _: done.append(project))
        stored[-1].add_done_callback(lambda _: wake(wake_loop))

    def wake_loop() -> None:
        done.append("woken")

    with table.locked():
        add("first")
        table.wait_for_writer()
        for _ in range(5):
            add("second")
    wait_until(lambda: done.count("woken") == 2)
    assert done == ["first", "woken", *["second"] * 5, "woken"]
    wake(wake_loop)
    assert done[-2:] == ["woken", "woken"]


def test_bytes_over_the_bound_are_refused_at_once(engine: Engine, table: Table) -> None:
    """Bytes over the bound are refused at once, and taken again when there is room."""
    size = len(make_row("bound", "1").text)
    writer = make_writer(engine, max_waiting_bytes=2 * size)
    waiting = [submit(writer, "bound", name) for name in "12"]
    with pytest.raises(Unavailable, match="too many events are waiting"):
        submit(writer, "bound", "3")
    with running(writer):
        for future in waiting:
            future.result(60)
        submit(writer, "bound", "4").result(60)
    assert table.find_events("bound") == {"1", "2", "4"}


def test_a_request_that_expires_waiting_is_never_written(writer: Writer, table: Table) -> None:
    """A request whose time is up while it waits is answered in time, and never written."""
    with table.locked():
        first = submit(writer, "expired", "first")
        table.wait_for_writer()
        late = submit(writer, "expired", "late", seconds=0.6)
        with pytest.raises(Unavailable, match="not stored in time"):
            late.result(60)
    first.result(60)
    submit(writer, "expired", "last").result(60)
    assert table.find_events("expired") == {"first", "last"}


def test_a_request_expired_on_arrival_is_never_written(engine: Engine, table: Table) -> None:
    """A request whose time was up before anybody looked is not written either."""
    now = [time.monotonic()]
    writer = make_writer(engine, clock=lambda: now[0])
    late = submit(writer, "stale", "late", seconds=1)
    now[0] += 1
    on_time = submit(writer, "stale", "on time", seconds=9)
    with writer:
        on_time.result(60)
        assert isinstance(late.exception(60), Unavailable)
    assert table.find_events("stale") == {"on time"}


def test_a_hanging_commit_is_answered_in_time(writer: Writer, table: Table) -> None:
    """Who waits for a commit that hangs is answered before the deadline, and the writer heals."""
    with table.locked():
        hanging = submit(writer, "hanging", "1", seconds=4.0)
        table.wait_for_writer()
        behind = submit(writer, "hanging", "2")
        for future in (hanging, behind):
            with pytest.raises(Unavailable):
                future.result(60)
    wait_until(lambda: is_open(writer, "hanging"))
    assert table.find_events("hanging") - {"1"} == {"late"}


def test_a_commit_ending_at_its_cut_keeps_writing(
    engine: Engine, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that ends in the very moment of its cut does not close the writer for good."""
    link = GuardedConnection(engine)
    with Writer(link, EventStore(ENCODER.columns), max_waiting_bytes=1 << 20) as writer:
        submit(writer, "cut", "first").result(60)
        with monkeypatch.context() as patch:
            patch.setattr(link, "cut_if_overdue", lambda: True)
            writer.check()
        wait_until(lambda: is_open(writer, "cut"))
    assert table.find_events("cut") == {"first", "late"}


@pytest.mark.parametrize("company", ["alone", "in a group"])
def test_refused_data_fails_only_its_own_request(
    company: str, writer: Writer, table: Table
) -> None:
    """Data that PostgreSQL refuses fails its own request, whole, and no other."""
    project = f"refused {company}"
    neighbours = []
    with ExitStack() as lock:
        if company == "in a group":
            lock.enter_context(table.locked())
            neighbours.append(submit(writer, project, "a"))
            table.wait_for_writer()
            neighbours.append(submit(writer, project, "b"))
        poison = submit(writer, project, "x", "y", event_name=POISON)
        if company == "in a group":
            neighbours.append(submit(writer, project, "c", "d"))
    assert isinstance(poison.exception(60), Internal)
    for future in neighbours:
        future.result(60)
    assert table.find_events(project) == ({"a", "b", "c", "d"} if neighbours else set())
    assert is_open(writer, project)


def test_a_request_cancelled_before_its_turn_is_unwritten(writer: Writer, table: Table) -> None:
    """A request whose caller has gone before its turn is not written."""
    with table.locked():
        first = submit(writer, "cancelled", "first")
        table.wait_for_writer()
        gone, last = submit(writer, "cancelled", "gone"), submit(writer, "cancelled", "last")
        assert gone.cancel()
    first.result(60)
    last.result(60)
    assert table.find_events("cancelled") == {"first", "last"}


def test_a_caller_leaving_during_commit_disturbs_nobody(writer: Writer, table: Table) -> None:
    """A caller who goes during its commit disturbs nobody."""
    with table.locked():
        gone = submit(writer, "leaving", "gone")
        table.wait_for_writer()
        gone.cancel()
        last = submit(writer, "leaving", "last")
    last.result(60)
    assert "last" in table.find_events("leaving")


def test_stopping_stores_what_waits_and_refuses_more(engine: Engine, table: Table) -> None:
    """Stopping stores what waits, and refuses what comes after that."""
    with running(make_writer(engine)) as writer:
        with table.locked():
            stored = [submit(writer, "stopped", "1")]
            table.wait_for_writer()
            stored += [submit(writer, "stopped", name) for name in "23"]
            stopping = threading.Thread(target=writer.stop)
            stopping.start()
            wait_until(lambda: not is_accepting(writer))
        stopping.join(60)
        assert [future.exception(0) for future in stored] == [None] * 3
    assert table.find_events("stopped") == set("123")


def is_accepting(writer: Writer) -> bool:
    """Whether the writer takes a request, were it an empty one."""
    try:
        submit(writer, "stopped")
    except Unavailable:
        return False
    return True


def test_writes_fail_at_once_during_an_outage() -> None:
    """While the database is away the first request fails in time, and the next ones at once."""
    engine = open_engine("postgresql://me@127.0.0.1:1/db")
    with running(make_writer(engine)) as writer:
        with pytest.raises(Unavailable):
            submit(writer, "away", "1").result(60)
        with pytest.raises(Unavailable, match="storage is unavailable"):
            submit(writer, "away", "2")


def test_a_deadlocked_transaction_is_repeated_unseen(writer: Writer, table: Table) -> None:
    """A transaction that deadlocked with another one is run again, unseen by the caller."""
    with table.transaction("SET LOCAL deadlock_timeout = '10s'") as cursor:
        cursor.execute(INSERT, "b")
        stored = submit(writer, "deadlock", "a", "b", "c")
        wait_until(lambda: table.query(BLOCKED_BY_ROW))
        cursor.execute(INSERT, "a")
    stored.result(60)
    assert table.find_events("deadlock") == set("abc")


RAISE = """
CREATE OR REPLACE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_query() ~ TG_ARGV[1] THEN
        RAISE EXCEPTION 'not this one' USING ERRCODE = TG_ARGV[0];
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER complain BEFORE INSERT ON events FOR EACH ROW WHEN (NEW.event_name = 'odd')
EXECUTE FUNCTION complain('{code}', '{query}');
"""
UNTRIGGER = "DROP TRIGGER complain ON events"


@contextmanager
def complaining(table: Table, code: str, query: str = "") -> Iterator[None]:
    """Have PostgreSQL raise an error for each event of one name, if the statement matches."""
    with table.transaction(RAISE.format(code=code, query=query)):
        pass
    yield
    with table.transaction(UNTRIGGER):
        pass


def submit_in_company(
    writer: Writer, table: Table, project: str, **fields: Any
) -> "tuple[Future[None], list[Future[None]]]":
    """Hand in a request that shares its group with others; return its future and theirs."""
    with table.locked():
        neighbours = [submit(writer, project, "a")]
        table.wait_for_writer()
        neighbours.append(submit(writer, project, "b"))
        odd = submit(writer, project, "x", **fields)
        neighbours.append(submit(writer, project, "c", "d"))
    return odd, neighbours


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("P0001", Internal),  # what a trigger raises if it says no more
        ("42501", Internal),  # insufficient privilege
        ("22023", Internal),  # invalid parameter value
        ("XX000", Unavailable),  # an internal error
    ],
)
def test_an_error_of_one_request_spares_its_neighbours(
    code: str,
    answer: type[Exception],
    writer: Writer,
    table: Table,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever error a request causes, its neighbours are stored, and it is logged once."""
    project = f"raises {code}"
    with complaining(table, code):
        for _ in range(2):
            odd, neighbours = submit_in_company(writer, table, project, event_name="odd")
            assert isinstance(odd.exception(60), answer)
            for future in neighbours:
                future.result(60)
    assert table.find_events(project) == {"a", "b", "c", "d"}
    assert caplog.text.count("a request could not be stored") == 1
    assert "the database is unavailable" not in caplog.text


def test_an_internal_error_of_copy_is_passed_by_staging(writer: Writer, table: Table) -> None:
    """An error that PostgreSQL calls its own, and only COPY into the table meets, costs nothing."""
    with complaining(table, "XX000", "COPY events "):
        odd, neighbours = submit_in_company(writer, table, "staged", event_name="odd")
        for future in (odd, *neighbours):
            future.result(60)
    assert table.find_events("staged") == {"a", "b", "c", "d", "x"}


def test_a_held_row_delays_its_own_request_only(
    writer: Writer, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a group, only the request whose row another transaction holds is refused, for now."""
    submit(writer, "deadlock", "held").result(60)
    with table.transaction("DELETE FROM events WHERE event_id = 'held'"):
        held = submit(writer, "deadlock", "held", "new")
        wait_until(lambda: table.query(BLOCKED_BY_ROW))
        neighbours = [submit(writer, "deadlock", f"n{number}") for number in range(20)]
        again = submit(writer, "deadlock", "held")
        for future in neighbours:
            future.result(60)
        for future in (held, again):
            assert isinstance(future.exception(60), Unavailable)
        assert is_open(writer, "deadlock")
    assert "the database is unavailable" not in caplog.text
    submit(writer, "deadlock", "held", "new").result(60)
    assert {"held", "new"} <= table.find_events("deadlock")


def test_a_short_deadline_can_be_met(writer: Writer) -> None:
    """A request with less time than the usual margin is stored, not refused unseen."""
    submit(writer, "short", "warm").result(60)

    def is_stored() -> bool:
        try:
            submit(writer, "short", "hasty", seconds=0.2).result(60)
        except Unavailable:
            return False
        return True

    wait_until(is_stored)
