"""Retention drops a month while others read, list and index the partitions."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import TypeVar

import pytest
from sqlalchemy import text

from server.storage import event_queries
from server.storage.connection import Connection, Engine, connected, open_engine
from server.storage.errors import Conflict
from server.storage.event_queries import EventFilter, EventQueries, StoredEvent
from server.storage.indexes import build_indexes, count_missing_indexes
from server.storage.partitions import MONTHS_AHEAD, add_months
from server.storage.retention import drop_partition, list_expired_partitions
from tests.support.database import WAITING_LOCKS
from tests.support.services import wait_until

OLD = "events_2023_12"
NOW = datetime(2024, 3, 1, tzinfo=UTC)
T = TypeVar("T")
COUNT_WAITING = text(f"SELECT count(*) FROM {WAITING_LOCKS}")


@pytest.fixture
def engine(create_migrated: Callable[[], str]) -> Engine:
    """Return a database with three months."""
    engine = open_engine(create_migrated())
    with connected(engine) as connection:
        add_months(connection, date(2023, 12, 31))
    return engine


def read_during_drop(engine: Engine, read: Callable[[], T]) -> T:
    """Begin to drop a month, start to read, and end the drop once the reader waits for it."""
    with ThreadPoolExecutor(1) as threads, connected(engine) as dropper:
        dropper.exec_driver_sql(f"DROP TABLE {OLD}")
        answer = threads.submit(read)
        wait_until(lambda: count_waiting(engine) > 0 or answer.done())
        assert not answer.done()
        dropper.commit()
        return answer.result()


def count_waiting(engine: Engine) -> int:
    """Return how many locks are waited for in the database."""
    with connected(engine) as connection:
        return int(connection.scalar(COUNT_WAITING) or 0)


def test_retention_passes_over_a_dropped_month(engine: Engine) -> None:
    """Months that another run drops while this one measures them are not listed."""
    with connected(engine) as connection:
        for months in range(0, 60, MONTHS_AHEAD + 1):
            add_months(connection, date(2010 + months // 12, months % 12 + 1, 1))
    with ThreadPoolExecutor(1) as threads, connected(engine) as lister:
        dropping = threads.submit(drop_all, engine)
        while not dropping.done():
            assert all(partition.size for partition in list_expired_partitions(lister, NOW))
            lister.commit()
        dropping.result()


def drop_all(engine: Engine) -> None:
    """Drop each month in a transaction of its own."""
    with connected(engine) as connection:
        for partition in list_expired_partitions(connection, NOW):
            connection.commit()
            with suppress(Conflict):
                drop_partition(connection, partition)


def test_the_newest_events_are_found_beside_retention(engine: Engine) -> None:
    """The newest events are looked for while a month is dropped."""
    with connected(engine) as connection:
        assert read_during_drop(engine, lambda: find_newest(connection)) == []


def test_a_month_may_go_once_it_was_listed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest events are looked for although a month is gone that was listed a moment ago."""
    listed = text(f"SELECT '{OLD}' AS name, 1 AS pages")
    monkeypatch.setattr(event_queries, "_LIST_PARTITIONS", listed)
    with connected(engine) as connection:
        connection.exec_driver_sql(f"DROP TABLE {OLD}")
        connection.commit()
        assert find_newest(connection) == []


def find_newest(connection: Connection) -> list[StoredEvent]:
    """Look for the newest events of a year."""
    return EventQueries(connection).find_newest(EventFilter(), NOW, NOW - timedelta(days=365), 10)


def test_indexes_are_built_while_a_month_goes(engine: Engine) -> None:
    """A month that is dropped while its index is to be built leaves the others theirs."""
    with connected(engine) as connection:
        connection.exec_driver_sql("DROP INDEX events_received_at")
        connection.exec_driver_sql(
            "CREATE INDEX events_received_at ON ONLY events USING brin (received_at)"
        )
        connection.commit()
    read_during_drop(engine, lambda: build_indexes(engine))
    with connected(engine) as connection:
        assert count_missing_indexes(connection) == 0
