"""The index on the arrival of events is on every partition, and is built beside a service."""

import threading
from collections.abc import Callable
from contextlib import closing
from datetime import date

import psycopg2
import pytest
from psycopg2.extensions import connection as Connection

from server.storage.connection import connected, open_engine
from server.storage.indexes import build_indexes, count_missing_indexes
from server.storage.migrate import migrate
from server.storage.partitions import add_months
from tests.support.services import wait_until

INSERT = """
INSERT INTO events (event_id, project_id, session_id, event_type, event_timestamp)
VALUES (%s, 'p', 's', 'custom', '2023-12-31T12:00Z')
"""
INDEXES = """
SELECT indrelid::regclass::text, indisvalid FROM pg_index JOIN pg_class c ON c.oid = indexrelid
 WHERE relname LIKE '%received_at%' AND relname NOT LIKE 'rejected%' ORDER BY 1
"""
# Once it waits for a writer, the index is in the catalogue, and is left there if it is cancelled.
BUILDING = """
SELECT pid FROM pg_stat_progress_create_index
 WHERE relid = 'events_2023_12'::regclass AND phase LIKE 'waiting for writers%'
"""
TABLES = ["events", "events_2023_12", "events_2024_01", "events_2024_02", "events_default"]


@pytest.fixture
def url(create_migrated: Callable[[], str]) -> str:
    """Return a database with three months."""
    url = create_migrated()
    with connected(open_engine(url)) as connection:
        add_months(connection, date(2023, 12, 31))
    return url


def open_connection(url: str) -> Connection:
    """Open a connection that commits each statement."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    return connection


def read(connection: Connection, statement: str) -> list[tuple[object, ...]]:
    """Return the rows of a query."""
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall()


def test_new_partitions_are_born_with_the_index(url: str) -> None:
    """After `migrate` the parent and all partitions have it, those that were added later too."""
    with closing(open_connection(url)) as connection:
        assert read(connection, INDEXES) == [(table, True) for table in TABLES]


def test_migrate_indexes_an_older_database_again_and_again(url: str) -> None:
    """`migrate` builds what is missing, and a second time there is nothing to build."""
    engine = open_engine(url)
    with closing(open_connection(url)) as connection:
        connection.cursor().execute("DROP INDEX events_received_at")
        with connected(engine) as other:
            assert count_missing_indexes(other) == 4
        for _ in range(2):
            migrate(engine)
            assert read(connection, INDEXES) == [(table, True) for table in TABLES]


def test_an_interrupted_build_goes_on_later(url: str) -> None:
    """A build that is cancelled leaves an invalid index, which the next one replaces."""
    engine = open_engine(url)
    failures: list[Exception] = []

    def build() -> None:
        try:
            build_indexes(engine)
        except Exception as failure:  # noqa: BLE001 - looked at below
            failures.append(failure)

    with closing(open_connection(url)) as connection, closing(psycopg2.connect(url)) as writer:
        connection.cursor().execute("DROP INDEX events_received_at")
        connection.cursor().execute(
            "CREATE INDEX events_received_at ON ONLY events USING brin (received_at)"
        )
        writer.cursor().execute(INSERT, ["open"])  # whose end a concurrent build waits for
        building = threading.Thread(target=build)
        building.start()
        wait_until(lambda: read(connection, BUILDING))
        # Ingestion goes on meanwhile.
        connection.cursor().execute(INSERT, ["beside"])
        [(pid,)] = read(connection, BUILDING)
        connection.cursor().execute("SELECT pg_cancel_backend(%s)", [pid])
        building.join()
        writer.commit()
        assert len(failures) == 1
        assert ("events_2023_12", False) in read(connection, INDEXES)
        build()
        assert len(failures) == 1
        assert read(connection, INDEXES) == [(table, True) for table in TABLES]


def test_builds_at_the_same_time_take_turns(url: str) -> None:
    """Several commands at once build each index once, and none fails."""
    engine = open_engine(url)
    with closing(open_connection(url)) as connection:
        connection.cursor().execute("DROP INDEX events_received_at")
        failures: list[Exception] = []

        def build() -> None:
            try:
                build_indexes(engine)
            except Exception as failure:  # noqa: BLE001 - looked at below
                failures.append(failure)

        builders = [threading.Thread(target=build) for _ in range(3)]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join()
        assert failures == []
        assert read(connection, INDEXES) == [(table, True) for table in TABLES]
