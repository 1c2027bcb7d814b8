"""What a standby has not confirmed is not acknowledged."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.errors import Unavailable
from server.storage.connection import Engine, connected, open_engine
from server.storage.embedded import EmbeddedPostgres
from server.storage.events import EventStore
from server.storage.migrate import migrate
from tests.support.events import ENCODER, make_row
from tests.support.services import query, wait_until

WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
CANCEL = f"SELECT pg_cancel_backend(pid) FROM ({WAITING}) AS waiting"


@pytest.fixture(scope="module")
def engine(open_directory: Path) -> Iterator[Engine]:
    """Open a PostgreSQL of its own, whose synchronous standby is away."""
    with EmbeddedPostgres(open_directory / "primary", create=True) as server:
        engine = open_engine(server.url)
        migrate(engine)
        with connected(engine) as connection:
            connection.exec_driver_sql("COMMIT")  # ALTER SYSTEM must not be in a transaction
            connection.exec_driver_sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        query(engine, "SELECT pg_reload_conf()")
        wait_until(lambda: query(engine, "SHOW synchronous_standby_names") == [("nobody",)])
        yield engine


def save(engine: Engine, event_id: str, seconds: float) -> None:
    """Store an event."""
    with connected(engine) as connection:
        EventStore(ENCODER.columns).save(connection, [make_row("p", event_id)], seconds)


def fail_unconfirmed(engine: Engine, event_id: str) -> None:
    """Store an event whose wait for the standby is cancelled, and check that this fails."""
    with ThreadPoolExecutor(1) as threads:
        saving = threads.submit(save, engine, event_id, 60)
        wait_until(lambda: query(engine, CANCEL))
        with pytest.raises(Unavailable, match="unknown"):
            saving.result(60)


@pytest.mark.parametrize("level", ["notice", "error"])
def test_a_cancelled_wait_for_the_standby_is_no_success(level: str, engine: Engine) -> None:
    """A commit whose wait is cancelled fails, though it is stored, whatever the role may see."""
    with connected(engine) as connection:
        connection.exec_driver_sql("SET LOCAL synchronous_commit = local")
        connection.exec_driver_sql(f"ALTER ROLE productgraph SET client_min_messages = {level}")
    fail_unconfirmed(engine, level)
    assert query(engine, f"SELECT 1 FROM events WHERE event_id = '{level}'") == [(1,)]


def test_a_duplicate_waits_for_the_standby_as_well(engine: Engine) -> None:
    """A retry of an event that is stored and not confirmed is not acknowledged either."""
    for _ in range(2):
        fail_unconfirmed(engine, "again")
