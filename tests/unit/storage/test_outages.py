"""An outage is one line at its start and one at its end, however many connections see it."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Unavailable
from server.storage.connection import Engine, GuardedConnection, open_engine
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
