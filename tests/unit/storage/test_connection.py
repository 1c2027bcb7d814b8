"""A connection that hangs is cut, and what the driver raises is told in our terms."""

import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg2
import pytest
from psycopg2.extensions import make_dsn, parse_dsn
from sqlalchemy import text
from sqlalchemy.engine import make_url

from server.errors import Unavailable
from server.storage.connection import (
    PING_TIMEOUT_SECONDS,
    Engine,
    GuardedConnection,
    connected,
    open_engine,
)
from server.storage.embedded import EmbeddedPostgres
from server.storage.errors import (
    Conflict,
    DatabaseError,
    Fault,
    NodeFailed,
    Refused,
    translated_errors,
)
from server.storage.health import Readiness, Watchdog
from server.storage.outages import OutageLog
from tests.support.services import wait_until

UNREACHABLE = "postgresql://me:s3cret@127.0.0.1:1/db"
FREEING_SECONDS = 20.0
END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"


@pytest.fixture
def link(engine: Engine) -> Iterator[GuardedConnection]:
    """Provide a link that a watchdog cuts."""
    with watched_link(engine) as link:
        yield link


@contextmanager
def watched_link(engine: Engine) -> Iterator[GuardedConnection]:
    """Provide a link that a watchdog cuts, closed at the end."""
    with GuardedConnection(engine) as link, Watchdog(link.cut_if_overdue):
        yield link


def run(link: GuardedConnection, statement: str, seconds: float = 5.0) -> object:
    """Return the first value that a statement yields."""
    with link.connected(seconds) as connection:
        result = connection.execute(text(statement))
        return result.scalar() if result.returns_rows else None


def fail_with(sqlstate: str) -> str:
    """Return a statement that PostgreSQL answers with this error."""
    return f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END $$"


@pytest.mark.parametrize("statement", ["SELECT pg_sleep(60)", "SELECT pg_advisory_lock(1)"])
def test_a_hanging_query_is_cut_at_its_deadline(
    statement: str, url: str, link: GuardedConnection
) -> None:
    """A query that hangs is given up when its time is over, and the next one works."""
    with closing(psycopg2.connect(url)) as holder:
        holder.cursor().execute("SELECT pg_advisory_lock(1)")
        start = time.monotonic()
        with pytest.raises(Unavailable):
            run(link, statement, seconds=0.4)
        assert 0.4 <= time.monotonic() - start < FREEING_SECONDS
        assert run(link, "SELECT 1") == 1


def test_a_use_broken_off_tells_of_a_node(engine: Engine) -> None:
    """A statement that waits for another node can be broken off; the database counts as there."""
    with GuardedConnection(engine, outages=OutageLog()) as link, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(run, link, "SELECT pg_sleep(60)", 60.0)

        def is_broken_off() -> bool:
            link.break_off(0.2)
            return waiting.done()

        link.break_off(60.0)  # has not been used for so long
        wait_until(is_broken_off)
        assert isinstance(waiting.exception(60), NodeFailed)
        link.break_off(0.0)  # is not in use
        assert run(link, "SELECT 1") == 1


def test_idle_time_between_uses_is_not_limited(engine: Engine) -> None:
    """Time limits a use of a link, not the link."""
    now = [0.0]
    link = GuardedConnection(engine, clock=lambda: now[0])
    run(link, "SELECT 1", seconds=1)
    now[0] += 100
    assert not link.cut_if_overdue()
    assert run(link, "SELECT 2", seconds=1) == 2
    link.close()


def test_an_overstaying_use_is_reported_once(engine: Engine) -> None:
    """A use that overstays is reported once."""
    now = [0.0]
    link = GuardedConnection(engine, clock=lambda: now[0])
    with link.connected(1):
        assert not link.cut_if_overdue()
        now[0] += 1
        assert [link.cut_if_overdue() for _ in range(3)] == [True, False, False]
    with pytest.raises(Unavailable):
        link.ping()
    link.close()


def to_message(kind: bytes, content: bytes) -> bytes:
    """Return a message of PostgreSQL's protocol."""
    return kind + (len(content) + 4).to_bytes(4) + content


PARAMETERS = {
    "server_version": "18.0",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "standard_conforming_strings": "on",
}
GREETING = b"".join(
    [
        to_message(b"R", bytes(4)),
        *(to_message(b"S", f"{name}\0{value}\0".encode()) for name, value in PARAMETERS.items()),
        to_message(b"K", bytes(8)),
        to_message(b"Z", b"I"),
    ]
)


@contextmanager
def silent_server(delay: float) -> Iterator[str]:
    """Provide the URL of a PostgreSQL that lets one in after a delay, then is silent."""
    done = threading.Event()

    def answer() -> None:
        with listener.accept()[0] as client:
            client.recv(1024)
            time.sleep(delay)
            client.sendall(GREETING)
            done.wait(60)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        threads.submit(answer)
        port = listener.getsockname()[1]
        yield f"postgresql://me@127.0.0.1:{port}/db?sslmode=disable&gssencmode=disable"
        done.set()


@pytest.mark.parametrize("delay", [0.0, 0.7])
def test_a_database_silent_after_login_is_abandoned(delay: float) -> None:
    """A database that falls silent right after a log-in, quick or slow, is given up as well."""
    with silent_server(delay) as url, watched_link(open_engine(url)) as link:
        start = time.monotonic()
        with pytest.raises(Unavailable):
            run(link, "SELECT 1", seconds=0.5)
        assert time.monotonic() - start < FREEING_SECONDS


@pytest.mark.parametrize(
    ("sqlstate", "translation"),
    [
        ("40P01", Conflict),  # deadlock detected
        ("40001", Conflict),  # serialization failure
        ("55P03", Conflict),  # lock not available
        ("23505", Refused),  # unique violation
        ("23514", Refused),  # check violation
        ("22021", Refused),  # character not in repertoire
        ("22P02", Refused),  # invalid text representation
        ("57014", Unavailable),  # query canceled, by statement_timeout among others
        ("57P01", Unavailable),  # admin shutdown
        ("53100", Unavailable),  # disk full
        ("53200", Unavailable),  # out of memory
        ("58030", Unavailable),  # I/O error
        ("08006", NodeFailed),  # connection failure, of one that our server opens
        ("08P01", Unavailable),  # protocol violation
        ("25006", Unavailable),  # read-only transaction, on a standby
        ("42P01", Fault),  # undefined table: a fault of ours
        ("XX000", Fault),  # internal error
        ("QQ000", Fault),  # one that the driver has no class for
    ],
)
def test_database_errors_say_whether_to_try_again(
    sqlstate: str, translation: type[Exception], link: GuardedConnection
) -> None:
    """Errors say whether to try again now, later or never; only our server's outage is the end."""
    session = run(link, "SELECT pg_backend_pid()")
    with pytest.raises(translation):
        run(link, fail_with(sqlstate))
    kept = run(link, "SELECT pg_backend_pid()") == session
    assert kept is (translation is not Unavailable)


def test_a_killed_session_is_replaced_after_its_use(
    engine: Engine, link: GuardedConnection
) -> None:
    """A session that the server ended is found out by its next use, and replaced after that."""
    session = run(link, "SELECT pg_backend_pid()")
    with connected(engine) as connection:
        connection.execute(text(f"SELECT pg_terminate_backend({session}, 5000)"))
    with pytest.raises(Unavailable, match="storage is unavailable"):
        run(link, "SELECT 1")
    assert run(link, "SELECT 1") == 1


def test_an_error_without_a_code_is_an_outage() -> None:
    """An error that has no code, as of a server that dies while it is written to, is an outage."""
    with pytest.raises(Unavailable), translated_errors():
        raise psycopg2.DatabaseError("server closed the connection unexpectedly")


def test_an_unreachable_database_can_be_closed_repeatedly() -> None:
    """Where no database answers, the link says so, and can be closed as often as one likes."""
    link = GuardedConnection(open_engine(UNREACHABLE))
    with pytest.raises(Unavailable):
        link.ping()
    link.close()
    link.close()


def test_a_connection_error_does_not_show_the_password() -> None:
    """The error of a command names the problem in one line, without the password."""
    engine = open_engine(UNREACHABLE)
    with pytest.raises(DatabaseError, match="Connection refused") as failure, connected(engine):
        pass
    assert "\n" not in str(failure.value)
    assert "s3cret" not in "".join(traceback.format_exception(failure.value))


def test_waiting_for_a_database_can_be_stopped() -> None:
    """Who waits for a database that is away can be told to stop."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(
            GuardedConnection(open_engine(UNREACHABLE)).wait_until_available, stop
        )
        stop.set()
        assert waiting.result(60) is False


def test_a_failing_check_does_not_stop_the_watchdog(caplog: pytest.LogCaptureFixture) -> None:
    """A check that fails is logged, and stops neither the others nor itself."""
    calls: list[str] = []

    def fail() -> None:
        calls.append("fail")
        raise ZeroDivisionError

    with Watchdog(fail, lambda: calls.append("next")):
        wait_until(lambda: len(calls) >= 4)
    assert calls[:4] == ["fail", "next"] * 2
    assert "ZeroDivisionError" in caplog.text


@contextmanager
def watched_readiness(url: str) -> Iterator[Readiness]:
    """Provide a probe of this database that has found it ready."""
    readiness = Readiness(GuardedConnection(open_engine(url)))
    with Watchdog(readiness.check), readiness:
        wait_until(readiness.is_ready)
        yield readiness
        readiness.withdraw()
        assert not readiness.is_ready()


def test_readiness_follows_a_refusing_database(
    postgres_url: str, create_database: Callable[[], str]
) -> None:
    """The service is unready once its database refuses connections, and ready after that."""
    url = make_url(create_database())
    with (
        watched_readiness(url.render_as_string(hide_password=False)) as readiness,
        connected(open_engine(postgres_url)) as admin,
    ):
        admin.execute(text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS false"))
        admin.execute(text(END_SESSIONS), {"name": url.database})
        admin.commit()
        wait_until(lambda: not readiness.is_ready())
        admin.execute(text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS true"))
        admin.commit()
        wait_until(readiness.is_ready)


@pytest.mark.slow
def test_readiness_follows_a_frozen_database(open_directory: Path) -> None:
    """The service is unready once its database is frozen, and ready after the thaw."""
    directory = open_directory / "frozen"
    with EmbeddedPostgres(directory, create=True) as embedded:
        number = (directory / "postgres" / "postmaster.pid").read_text().split()[0]
        postmaster = psutil.Process(int(number))
        with watched_readiness(embedded.url) as readiness:
            processes = [postmaster, *postmaster.children()]
            try:
                for process in processes:
                    process.suspend()
                wait_until(lambda: not readiness.is_ready())
            finally:
                for process in processes:
                    process.resume()
            wait_until(readiness.is_ready)


@pytest.mark.slow
def test_two_silent_hosts_cost_their_time_once(create_database: Callable[[], str]) -> None:
    """A database is reached although two hosts before it take more than all of a ping's time."""
    place = parse_dsn(create_database())
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        port = silent.getsockname()[1]
        hosts = {
            "host": f"127.0.0.1,127.0.0.1,{place.get('host', 'localhost')}",
            "port": f"{port},{port},{place.get('port', 5432)}",
        }
        with watched_link(open_engine(make_dsn(**{**place, **hosts}))) as link:
            slow = "SELECT count(pg_sleep(0.3))"  # long enough for a watchdog to look
            assert run(link, slow, PING_TIMEOUT_SECONDS) == 1
            assert run(link, "SELECT 1", seconds=2.0) == 1  # less than the silent hosts take


def test_a_host_that_hangs_up_is_passed_over(create_database: Callable[[], str]) -> None:
    """A host that takes a connection and ends it at once does not hide the one after it."""
    place = parse_dsn(create_database())

    def hang_up() -> None:
        with suppress(OSError):
            while True:
                listener.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        threads.submit(hang_up)
        hosts = {
            "host": f"127.0.0.1,{place.get('host', 'localhost')}",
            "port": f"{listener.getsockname()[1]},{place.get('port', 5432)}",
        }
        try:
            with connected(open_engine(make_dsn(**{**place, **hosts}))) as connection:
                assert connection.scalar(text("SELECT 1")) == 1
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def test_each_failed_transaction_is_counted_by_kind(engine: Engine) -> None:
    """Each transaction that fails is told by its kind, and one that does not is not."""
    told: list[str] = []
    link = GuardedConnection(engine, on_error=told.append)
    away = GuardedConnection(open_engine(UNREACHABLE), on_error=told.append)
    assert run(link, "SELECT 1") == 1
    for failing, statement, kind, error in (
        (link, "DO $$ BEGIN RAISE deadlock_detected; END $$", "conflict", Conflict),
        (link, "SELECT 'x'::integer", "refused", Refused),
        (link, "SELECT nonsense", "other", Fault),
        (away, "SELECT 1", "unavailable", Unavailable),
    ):
        with pytest.raises(error):
            run(failing, statement)
        assert told.pop() == kind
    assert not told
    link.close()


def test_a_read_only_database_is_not_ready(
    create_database: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    """A database that takes no writes is unready and named in the log, until it takes them."""
    url = create_database()
    engine = open_engine(url)
    setting = f"ALTER DATABASE {make_url(url).database} SET default_transaction_read_only = "
    with GuardedConnection(engine) as link:
        run(link, f"{setting} on")
    readiness = Readiness(GuardedConnection(engine, outages=OutageLog()))
    with Watchdog(readiness.check), readiness:
        wait_until(lambda: "read-only" in caplog.text)
        assert not readiness.is_ready()
        with GuardedConnection(engine) as link:
            run(link, f"SET TRANSACTION READ WRITE; {setting} off")
        wait_until(readiness.is_ready)
