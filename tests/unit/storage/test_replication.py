"""What a standby has not confirmed is not acknowledged."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from server.errors import Unavailable
from server.storage.accounts import find_account
from server.storage.connection import (
    Engine,
    GuardedConnection,
    connected,
    open_engine,
    raw_cursor,
)
from server.storage.embedded import EmbeddedPostgres
from server.storage.errors import DatabaseError
from server.storage.events import EventStore
from server.storage.health import Readiness, Watchdog
from server.storage.keys import create_key
from server.storage.migrate import migrate
from server.storage.outages import OutageLog
from tests.support.events import ENCODER, make_row
from tests.support.postgres_server import PostgresServer, make_room
from tests.support.services import query, wait_until

pytestmark = pytest.mark.slow

WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
CANCEL = f"SELECT pg_cancel_backend(pid) FROM ({WAITING}) AS waiting"


@pytest.fixture(scope="module")
def engine(open_directory: Path) -> Iterator[Engine]:
    """Open a PostgreSQL of its own, whose synchronous standby is away."""
    with EmbeddedPostgres(open_directory / "primary", create=True) as server:
        engine = open_engine(server.url)
        migrate(engine)
        with connected(engine) as connection, raw_cursor(connection) as cursor:
            cursor.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        query(engine, "SELECT pg_reload_conf()")
        wait_until(lambda: query(engine, "SHOW synchronous_standby_names") == [("nobody",)])
        yield engine


def save(engine: Engine, event_id: str, seconds: float) -> None:
    """Store an event."""
    with connected(engine) as connection:
        EventStore(ENCODER.columns).save(connection, [make_row("p", event_id)], seconds)


def fail_unconfirmed(engine: Engine, event_id: str) -> str:
    """Store an event whose wait for the standby is cancelled; return how this fails."""
    with ThreadPoolExecutor(1) as threads:
        saving = threads.submit(save, engine, event_id, 60)
        wait_until(lambda: query(engine, CANCEL))
        with pytest.raises(DatabaseError, match="unknown") as failure:
            saving.result(60)
    return str(failure.value)


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


def test_broken_off_commits_leave_one_backend(engine: Engine) -> None:
    """A commit that was cut while it waits for the standby keeps its connection from another."""
    with GuardedConnection(engine) as link, Watchdog(link.cut_if_overdue):
        for number in range(3):
            with pytest.raises(Unavailable), link.connected(0.5) as connection:
                EventStore(ENCODER.columns).save(connection, [make_row("p", f"cut-{number}")], 60)
        count = (
            f"SELECT count(*) FROM ({WAITING} AND application_name = '{link.name}') AS broken_off"
        )
        assert query(engine, count) == [(1,)]
        query(engine, CANCEL)
        wait_until(lambda: query(engine, count) == [(0,)])
        with link.connected(60) as connection, connection.begin():
            assert connection.scalar(text("SELECT 1")) == 1


def test_a_database_without_its_standby_is_unready(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """While a commit waits for the standby in vain, the database is unready, as the log says."""
    readiness = Readiness(GuardedConnection(engine, outages=OutageLog()))
    with ThreadPoolExecutor(1) as threads, Watchdog(readiness.check), readiness:
        wait_until(readiness.is_ready)
        saving = threads.submit(save, engine, "waits", 60)
        wait_until(lambda: not readiness.is_ready())
        assert "synchronous standby" in caplog.text
        query(engine, CANCEL)
        wait_until(readiness.is_ready)
        with pytest.raises(DatabaseError):
            saving.result(60)


def test_every_commit_with_a_notice_is_doubtful(engine: Engine) -> None:
    """A command, and a thread that keeps its connection, are told of a wait that was cancelled."""

    def create_by_command() -> None:
        with connected(engine) as connection:
            create_key(connection, "p", "command")

    def create_in_thread() -> None:
        with GuardedConnection(engine) as link, link.connected(60) as connection:
            create_key(connection, "p", "thread")

    for create, error in ((create_by_command, DatabaseError), (create_in_thread, Unavailable)):
        with ThreadPoolExecutor(1) as threads:
            creating = threads.submit(create)
            wait_until(lambda: query(engine, CANCEL))
            with pytest.raises(error, match="the outcome of a commit is unknown"):
                creating.result(60)


@pytest.fixture
def german(open_directory: Path) -> Iterator[Engine]:
    """Open Debian's PostgreSQL, which speaks German, and whose standby is away."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    version = found[-1].parent.parent.name if found else ""
    catalogue = Path(f"/usr/share/locale/de/LC_MESSAGES/postgres-{version}.mo")
    if not catalogue.exists() or not Path("/usr/share/i18n/locales/de_DE").exists():
        pytest.skip("Debian's packages postgresql and locales are not installed")
    account = find_account(open_directory / "none")
    room = make_room(open_directory / "german", account)
    locale = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(room / "de_DE.UTF-8")]
    subprocess.run(locale, check=True)
    language = {"LOCPATH": str(room), "LC_ALL": "", "LC_MESSAGES": "de_DE.UTF-8", "LANGUAGE": ""}
    settings = {"lc_messages": "de_DE.UTF-8"}
    server = PostgresServer(room / "data", found[-1].parent, account, settings, language)
    try:
        server.create("--locale=C", "--lc-messages=de_DE.UTF-8")
        engine = open_engine(server.url)
        migrate(engine)
        server.configure("synchronous_standby_names", "nobody")
        yield engine
    finally:
        server.kill()


def test_a_german_cancelled_wait_is_no_success(german: Engine) -> None:
    """A server that warns in another language is understood as well."""
    assert "synchrone Replikation" in fail_unconfirmed(german, "deutsch")
