"""The months of the events table are there before their events are."""

import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import event, text

from server.events.copy_rows import Row
from server.storage.connection import Engine, GuardedConnection, connected, open_engine
from server.storage.errors import Conflict, RowLocked
from server.storage.events import EventStore
from server.storage.partitions import (
    _AWAIT,
    PartitionKeeper,
    _Month,
    add_months,
    months_from,
)
from server.storage.retention import drop_partition, list_expired_partitions
from tests.support.database import WAITING_LOCKS
from tests.support.events import ENCODER, make_row
from tests.support.services import query, wait_until

DECEMBER = date(2023, 12, 31)
DECEMBER_NOON = datetime(2023, 12, 31, 12, tzinfo=UTC)
NAMES = ["events_2023_12", "events_2024_01", "events_2024_02"]
PARTITIONS = """
SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
 WHERE inhparent = 'events'::regclass AND c.relname <> 'events_default' ORDER BY 1
"""
# On Citus, it is the name of a shard.
PLACES = r"""
SELECT event_id, regexp_replace(tableoid::regclass::text, '_\d{6,}$', '') FROM events ORDER BY 1
"""


@pytest.fixture
def engine(create_migrated: Callable[[], str]) -> Engine:
    """How the service connects to a fresh database."""
    return open_engine(create_migrated())


def add(engine: Engine, today: date = DECEMBER) -> None:
    """Add the months of this day."""
    link = GuardedConnection(engine)
    try:
        with link.connected(30) as connection:
            add_months(connection, today)
    finally:
        link.close()


def add_patiently(engine: Engine, today: date = DECEMBER) -> None:
    """Add the months as services do, which try again if they cannot have a lock in time."""
    wait_until(lambda: is_added(engine, today))


def is_added(engine: Engine, today: date = DECEMBER) -> bool:
    """Add the months, unless a lock cannot be had at the moment."""
    with suppress(Conflict):
        add(engine, today)
        return True
    return False


def save(engine: Engine, *moments: str) -> None:
    """Store an event for each of these moments, under it as its id."""
    rows = [
        make_row("p", moment, seconds=int(datetime.fromisoformat(f"{moment}+00:00").timestamp()))
        for moment in moments
    ]
    with connected(engine) as connection:
        EventStore(ENCODER.columns).save(connection, rows, 10)


@contextmanager
def transaction(engine: Engine, statement: str) -> Iterator[None]:
    """Provide a transaction of somebody else's that goes on meanwhile."""
    with connected(engine) as connection:
        connection.execute(text(statement))
        yield


@pytest.mark.parametrize(
    ("day", "count", "months"),
    [
        (date(2024, 1, 1), 1, [(date(2024, 1, 1), date(2024, 2, 1))]),
        (
            date(2023, 12, 31),
            2,
            [(date(2023, 12, 1), date(2024, 1, 1)), (date(2024, 1, 1), date(2024, 2, 1))],
        ),
        (
            date(2024, 10, 15),
            3,
            [
                (date(2024, 10, 1), date(2024, 11, 1)),
                (date(2024, 11, 1), date(2024, 12, 1)),
                (date(2024, 12, 1), date(2025, 1, 1)),
            ],
        ),
        (date(2024, 2, 29), 0, []),
    ],
)
def test_months_follow_each_other_across_years(
    day: date, count: int, months: list[tuple[date, date]]
) -> None:
    """Months follow each other, across the end of a year too."""
    assert list(months_from(day, count)) == months


def test_three_months_of_partitions_are_kept_ahead(engine: Engine) -> None:
    """This month and the next two get partitions, and a month later only one more."""
    add(engine)
    assert query(engine, PARTITIONS) == [(name,) for name in NAMES]
    add(engine, date(2024, 1, 1))
    assert query(engine, PARTITIONS) == [(name,) for name in [*NAMES, "events_2024_03"]]


def test_a_partition_begins_and_ends_at_utc_midnight(engine: Engine) -> None:
    """A month begins and ends at midnight UTC, whatever the database's own time zone."""
    with connected(engine) as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.execute(text(f"ALTER DATABASE {name} SET timezone = 'Pacific/Kiritimati'"))
    add(engine)
    moments = {
        "2023-11-30T23:59:59": "events_default",
        "2023-12-01T00:00:00": "events_2023_12",
        "2023-12-31T23:59:59": "events_2023_12",
        "2024-01-01T00:00:00": "events_2024_01",
        "2024-02-29T23:59:59": "events_2024_02",
        "2024-03-01T00:00:00": "events_default",
    }
    save(engine, *moments)
    assert query(engine, PLACES) == list(moments.items())


def test_rows_of_a_new_month_leave_the_default(engine: Engine) -> None:
    """Rows of a month that wait in the default partition move over, unchanged; others stay."""
    moments = ["2023-11-30T12:00:00", "2023-12-31T23:59:59", "2024-02-01T00:00:00"]
    save(engine, *moments)
    before = query(engine, "SELECT * FROM events ORDER BY event_id")
    add(engine)
    assert query(engine, "SELECT * FROM events ORDER BY event_id") == before
    places = ["events_default", "events_2023_12", "events_2024_02"]
    assert query(engine, PLACES) == list(zip(moments, places, strict=True))


@pytest.mark.parametrize("most_bytes", [128 << 20, 0], ids=["moved", "awaited"])
def test_tables_are_changed_by_single_statements(
    most_bytes: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes tables is sent by itself: Citus hands on all of a query for each statement."""
    monkeypatch.setattr("server.storage.partitions._MOST_BYTES", most_bytes)
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    add(engine)
    with connected(engine) as connection:
        [oldest, *_] = list_expired_partitions(connection, datetime(2024, 6, 1, tzinfo=UTC))
        connection.commit()
        drop_partition(connection, oldest)
    changes = [each for each in sent if re.search("ALTER|CREATE|DROP|LOCK TABLE", each)]
    assert len(changes) > 10
    assert [each for each in changes if ";" in each.strip().rstrip(";")] == []


def test_adding_the_same_months_again_takes_no_lock(engine: Engine) -> None:
    """Adding the same months again changes nothing, and takes no lock that a reader could hold."""
    add(engine)
    with transaction(engine, "LOCK TABLE events_default IN ACCESS SHARE MODE"):
        add(engine)
    assert query(engine, PARTITIONS) == [(name,) for name in NAMES]


def test_services_may_add_the_same_months_together(engine: Engine) -> None:
    """Several services that add the same months at the same moment do no harm."""
    save(engine, "2023-12-31T12:00:00", "2024-01-15T12:00:00")
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(add_patiently, [engine] * 4)) == [None] * 4
    assert query(engine, PARTITIONS) == [(name,) for name in NAMES]
    assert query(engine, "SELECT count(*) FROM events") == [(2,)]


def test_adding_months_gives_up_for_a_long_reader(engine: Engine) -> None:
    """A long reader makes it fail soon, and events are stored meanwhile; later it works."""
    save(engine, "2024-01-15T12:00:00")
    with (
        transaction(engine, "SELECT count(*) FROM events"),
        ThreadPoolExecutor(1) as threads,
    ):
        adding = threads.submit(add, engine)
        waiting = f"SELECT 1 FROM {WAITING_LOCKS} WHERE mode = 'AccessExclusiveLock'"
        wait_until(lambda: query(engine, waiting))
        save(engine, "2024-01-15T12:00:01")
        assert isinstance(adding.exception(60), Conflict)
    add(engine)
    assert query(engine, PLACES) == [
        ("2024-01-15T12:00:00", "events_2024_01"),
        ("2024-01-15T12:00:01", "events_2024_01"),
    ]


def save_patiently(engine: Engine, moment: str) -> None:
    """As the writer does, which meets a conflict by trying again."""
    while True:
        with suppress(Conflict):
            return save(engine, moment)


def test_no_event_is_lost_while_months_are_added(engine: Engine) -> None:
    """Events that are stored while months are added are all there, without an error."""
    stop = threading.Event()

    def save_until_told() -> list[str]:
        moments: list[str] = []
        while not stop.is_set():
            moment = DECEMBER_NOON + timedelta(days=37, seconds=1) * len(moments)
            moments.append(f"{moment:%Y-%m-%dT%H:%M:%S}")
            save_patiently(engine, moments[-1])
        return moments

    with ThreadPoolExecutor(2) as threads:
        savers = [threads.submit(save_until_told) for _ in range(2)]
        try:
            for month in range(1, 13):
                add_patiently(engine, date(2024, month, 1))
        finally:
            stop.set()
        saved = {moment for saver in savers for moment in saver.result(60)}
    assert {moment for [moment] in query(engine, "SELECT event_id FROM events")} == saved


def test_the_partition_keeper_starts_and_stops_cleanly(engine: Engine) -> None:
    """The keeper adds the months when it starts, and ends when it is told to."""
    with PartitionKeeper(GuardedConnection(engine), today=lambda: DECEMBER):
        wait_until(lambda: query(engine, PARTITIONS) == [(name,) for name in NAMES])


def test_the_partition_keeper_knows_the_default_partition(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events of months without a partition are counted while the service runs."""
    monkeypatch.setattr("server.storage.partitions._COUNT_SECONDS", 0.1)
    with PartitionKeeper(GuardedConnection(engine), today=lambda: DECEMBER) as keeper:
        wait_until(lambda: keeper.default_rows() == 0)
        store_month(engine, "2023-12", 5)
        store_month(engine, "2019-01", 7)
        wait_until(lambda: keeper.default_rows() == 7)


def test_the_partition_keeper_retries_after_a_long_reader(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that met a long reader is repeated soon."""
    monkeypatch.setattr("server.storage.partitions._SHORTEST_RETRY_SECONDS", 0.1)
    keeper = PartitionKeeper(GuardedConnection(engine), today=lambda: DECEMBER)
    with ExitStack() as stack:
        with transaction(engine, "LOCK TABLE events_default IN ACCESS SHARE MODE"):
            stack.enter_context(keeper)
            keeper_waits = f"SELECT 1 FROM {WAITING_LOCKS}"
            for _ in range(2):
                wait_until(lambda: query(engine, keeper_waits))
                wait_until(lambda: not query(engine, keeper_waits))
        wait_until(lambda: query(engine, PARTITIONS) == [(name,) for name in NAMES])


def test_the_keeper_tries_again_after_a_lost_connection(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round whose connection is ended in its middle is counted, and repeated soon."""
    monkeypatch.setattr("server.storage.partitions._SHORTEST_RETRY_SECONDS", 0.1)
    failures: list[None] = []
    keeper = PartitionKeeper(
        GuardedConnection(engine), lambda: DECEMBER, on_failure=lambda: failures.append(None)
    )
    waiting = f"SELECT pid FROM {WAITING_LOCKS} WHERE relation = 'events_default'::regclass"
    with ExitStack() as stack:
        with transaction(engine, "LOCK TABLE events_default IN ACCESS SHARE MODE"):
            stack.enter_context(keeper)
            ended = f"SELECT pg_terminate_backend(pid, 5000) FROM ({waiting}) AS keeper"
            wait_until(lambda: query(engine, ended))
        wait_until(lambda: query(engine, PARTITIONS) == [(name,) for name in NAMES])
    assert failures


def store_month(engine: Engine, month: str, count: int) -> list[Row]:
    """Store events of a month, and return their rows."""
    start = int(datetime.fromisoformat(f"{month}-01T00:00:00+00:00").timestamp())
    rows = [make_row("p", f"{month} {number}", seconds=start + number) for number in range(count)]
    with connected(engine) as connection:
        EventStore(ENCODER.columns).save(connection, rows, 60)
    return rows


def test_a_month_of_many_rows_stays_in_the_default(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A month with more rows than can be moved quickly is left where it is, and others are made."""
    monkeypatch.setattr("server.storage.partitions._MOST_ROWS", 10)
    january = store_month(engine, "2024-01", 11)
    store_month(engine, "2024-02", 10)
    add(engine)
    assert query(engine, PARTITIONS) == [(NAMES[0],), (NAMES[2],)]
    with connected(engine) as connection:
        EventStore(ENCODER.columns).save(connection, january, 60)
    assert query(engine, "SELECT count(*) FROM events_default") == [(11,)]
    assert query(engine, "SELECT count(*) FROM events_2024_02") == [(10,)]


CONSTRAINTS = """
SELECT count(*) FROM pg_constraint
 WHERE conrelid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'events'::regclass)
   AND contype = 'c'
"""


def test_a_large_default_is_not_read_under_a_lock(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a large default partition, months without rows are made, and leave nothing behind."""
    monkeypatch.setattr("server.storage.partitions._MOST_BYTES", 0)
    store_month(engine, "2019-05", 5)
    store_month(engine, "2024-01", 1)
    add(engine)
    assert query(engine, PARTITIONS) == [(NAMES[0],), (NAMES[2],)]
    assert query(engine, CONSTRAINTS) == [(0,)]
    store_month(engine, "2024-02", 3)
    assert query(engine, "SELECT count(*) FROM events_2024_02") == [(3,)]
    assert query(engine, "SELECT count(*) FROM events_default") == [(6,)]


def test_only_rows_of_an_awaited_month_are_put_off(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a month's partition is being made beside a large default one, its rows have to wait."""
    monkeypatch.setattr("server.storage.partitions._MOST_BYTES", 0)
    with connected(engine) as connection:
        month = _Month(connection, date(2024, 1, 1), date(2024, 2, 1))
        month.execute(_AWAIT)
    with pytest.raises(RowLocked):
        store_month(engine, "2024-01", 1)
    store_month(engine, "2024-02", 1)
    add(engine)  # as a service does that finds what a dead one has begun
    store_month(engine, "2024-01", 1)
    assert query(engine, PLACES) == [
        ("2024-01 0", "events_2024_01"),
        ("2024-02 0", "events_default"),
    ]


def test_no_event_is_stored_twice_while_its_month_moves(engine: Engine) -> None:
    """Events that are sent again while they move to their partition are there once, and stay."""
    rows = store_month(engine, "2024-01", 1500)
    stop = threading.Event()

    def save_again(seed: int) -> None:
        draw = random.Random(seed)
        with connected(engine) as connection:
            while not stop.is_set():
                with suppress(Conflict):
                    EventStore(ENCODER.columns).save(connection, draw.sample(rows, 300), 60)

    with ThreadPoolExecutor(2) as threads:
        savers = [threads.submit(save_again, seed) for seed in range(2)]
        try:
            add_patiently(engine)
        finally:
            stop.set()
        for saver in savers:
            saver.result(60)
    assert query(engine, "SELECT count(*), count(DISTINCT event_id) FROM events") == [(1500, 1500)]
    assert query(engine, "SELECT count(*) FROM events_2024_01") == [(1500,)]
