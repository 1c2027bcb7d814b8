"""An outage is one line at its start and one at its end, however many connections see it."""

import logging
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import parse_dsn

from server.errors import Unavailable
from server.storage.connection import Engine, GuardedConnection, connected, open_engine
from server.storage.errors import Obstacle
from server.storage.outages import OutageLog

BEGIN, END = "the database is unavailable", "the database is available again"


def read_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged since the last call."""
    messages = [record.message for record in caplog.records]
    caplog.clear()
    return messages


def test_connections_that_fail_together_are_one_outage(caplog: pytest.LogCaptureFixture) -> None:
    """The first failure begins an outage, with its cause, and the last recovery ends it."""
    now = 10.0
    outages = OutageLog(lambda: now)
    with caplog.at_level(logging.INFO):
        outages.note_failure("writer", ValueError("no route"))
        outages.note_failure("keys", None)
        assert "no route" in caplog.text
        now = 12.5
        outages.note_success("writer")
        assert read_messages(caplog) == [BEGIN]
        outages.note_success("keys")
        [record] = caplog.records
    assert (record.message, record.seconds) == (END, 2.5)  # type: ignore[attr-defined]


@given(moves=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_lines_of_outages_come_in_pairs(moves: list[tuple[int, bool]]) -> None:
    """Whatever fails and recovers in whatever order, starts and ends take turns."""
    lines: list[str] = []
    logger = logging.getLogger("productgraph.database")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        outages, failing = OutageLog(), set[int]()
        for connection, fails in moves:
            if fails:
                outages.note_failure(connection, None)
                failing.add(connection)
            else:
                outages.note_success(connection)
                failing.discard(connection)
            assert lines == [BEGIN, END] * (len(lines) // 2) + [BEGIN] * (len(lines) % 2)
            assert len(lines) % 2 == bool(failing)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_a_connection_reports_its_outage_and_recovery(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that cannot be opened begins an outage, and a query that works ends it."""
    outages = OutageLog()
    broken = GuardedConnection(open_engine("postgresql://127.0.0.1:1/none"), outages=outages)
    good = GuardedConnection(engine, outages=outages)
    with caplog.at_level(logging.INFO), broken, good:
        good.ping()
        for _ in range(3):
            with pytest.raises(Unavailable):
                broken.ping()
            good.ping()
        assert read_messages(caplog) == [BEGIN]
        broken._engine = engine
        broken.ping()
        assert read_messages(caplog) == [END]


def test_a_read_only_database_is_logged_once(
    create_database: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    """However many connections meet it, one line names the server, and one tells of its end."""
    url = create_database()
    name = parse_dsn(url)["dbname"]
    set_read_only = f"ALTER DATABASE {name} SET default_transaction_read_only = "
    outages = OutageLog()
    links = [GuardedConnection(open_engine(url), outages=outages) for _ in range(3)]
    with connected(open_engine(url)) as connection:
        connection.exec_driver_sql(f"{set_read_only} on")
    with caplog.at_level(logging.INFO):
        for link in links * 2:
            with pytest.raises(Unavailable):
                link.ping()
        [record] = caplog.records
        assert (record.levelname, record.message) == (
            "WARNING",
            "the database is a standby, or read-only",
        )
        assert record.database_port  # type: ignore[attr-defined]
        caplog.clear()
        with connected(open_engine(url)) as connection:
            connection.exec_driver_sql(f"SET TRANSACTION READ WRITE; {set_read_only} off")
        for link in links:
            with link:
                link.ping()
        assert read_messages(caplog) == [END]


def test_each_obstacle_of_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """An obstacle is told beside the loss of a connection, once for each server and outage."""
    outages = OutageLog()
    causes = [ValueError("no route"), Obstacle("read-only", "a", 1), Obstacle("read-only", "b", 1)]
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            for cause in causes * 2:
                outages.note_failure("writer", cause)
            assert read_messages(caplog) == [BEGIN, "read-only", "read-only"]
            outages.note_success("writer")
            assert read_messages(caplog) == [END]
