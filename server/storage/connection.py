"""The connections to PostgreSQL: opened alike, in one transaction mode, and cut if they hang."""

import logging
import math
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from os import dup
from typing import Any, Self

import psycopg2
from psycopg2.extensions import (
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_INERROR,
    TRANSACTION_STATUS_INTRANS,
    make_dsn,
    parse_dsn,
)
from psycopg2.extensions import connection as DriverConnection
from psycopg2.extensions import cursor as Cursor
from sqlalchemy import Connection as Connection
from sqlalchemy import Engine as Engine
from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.exc import DBAPIError

from server.errors import Unavailable
from server.storage.errors import (
    Conflict,
    DatabaseError,
    DoubtfulCommit,
    Fault,
    NodeFailed,
    Obstacle,
    OnError,
    Refused,
    name_kind,
    translated_errors,
)
from server.storage.outages import OutageLog

CONNECT_TIMEOUT_SECONDS = 2  # libpq's shortest, for each host that an address names
PING_TIMEOUT_SECONDS = 1.5
_RETRY_SECONDS = 0.2
_NAME = "productgraph"

# What every transaction sets, for itself: a session's settings do not survive PgBouncer, and those
# of a role, a database or the environment could change what a statement means. The names of tables
# are those of one schema, and no temporary table can take the place of one.
SEARCH_PATH = "SET LOCAL search_path = public, pg_temp;"
# A peer that vanishes, its machine without power or behind a broken network, would hold its locks
# for hours: no timeout but these ends a backend that waits for its client in the middle of COPY.
# They mean nothing on a Unix socket. A peer that is only stopped still answers them.
KEEPALIVES = """
SET LOCAL tcp_keepalives_idle = 5;
SET LOCAL tcp_keepalives_interval = 1;
SET LOCAL tcp_keepalives_count = 3;
SET LOCAL tcp_user_timeout = 8000;
"""
# A commit whose wait for the standby is cancelled, by an operator or a shutdown, succeeds with a
# warning: it may be lost with its server. No role hides that.
WARNINGS = "SET LOCAL client_min_messages = warning;"
# `default_transaction_read_only` is left alone: it is how a server is made read-only.
_SETTINGS = f"""
{SEARCH_PATH}
{KEEPALIVES}
{WARNINGS}
SET LOCAL idle_in_transaction_session_timeout = 60000;
SET LOCAL standard_conforming_strings = on;
SET LOCAL datestyle = 'ISO';
SET LOCAL timezone = 'UTC';
"""

# What keeps the database from confirming a write, which a query alone would not notice.
_FIND_OBSTACLE = """
SELECT CASE
    WHEN pg_is_in_recovery() OR CAST(current_setting('transaction_read_only') AS boolean)
    THEN 'the database is a standby, or read-only'
    WHEN EXISTS (
        SELECT FROM pg_stat_activity
         WHERE application_name ^@ %(name)s AND wait_event = 'SyncRep'
           AND state_change < clock_timestamp() - interval '3 s')
    THEN 'the synchronous standby of the database confirms no commit'
END
"""
# A backend is not told that its client has gone while it waits in its COMMIT, for the standby or
# for the disk. A name finds it behind a pooler too, and never on another server.
_FIND_LEFT = text("""
SELECT EXISTS (
    SELECT FROM pg_stat_activity
     WHERE application_name ^@ :name AND pid <> pg_backend_pid()
       AND lower(wait_event) IN ('syncrep', 'walsync', 'walwrite'))
""")
_OPEN = (TRANSACTION_STATUS_INTRANS, TRANSACTION_STATUS_INERROR)

_log = logging.getLogger("productgraph.database")


# Of startup parameters only the encoding and the name are sent: PgBouncer keeps them, and would
# refuse others.
_OPTIONS: dict[str, Any] = {
    "connect_timeout": CONNECT_TIMEOUT_SECONDS,
    "client_encoding": "UTF8",  # the texts' own, whatever PGCLIENTENCODING or the role say
    "keepalives_idle": 30,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}


def open_engine(address: str) -> Engine:
    """Return an engine whose connections time out when opened.

    `address` is whatever libpq takes, a URL or keywords, of one host or of several. All connections
    have one mode: the first statement begins a transaction, `commit` ends it.
    """
    places = _split_hosts(address)
    connect = partial(_connect, places)
    engine = create_engine(
        "postgresql+psycopg2://",
        creator=connect,
        execution_options={"connect": connect},
        poolclass=NullPool,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
        use_native_hstore=False,  # would cost a query at the first connection
    )
    event.listen(engine, "begin", _set_locally)
    return engine


def answers_without_transaction(engine: Engine) -> bool:
    """Return whether the database answers a query that is in no transaction."""
    with suppress(psycopg2.Error), closing(engine.get_execution_options()["connect"]()) as driver:
        driver.autocommit = True
        driver.cursor().execute("SELECT 1")
        return True
    return False


def split_password(address: str) -> tuple[str, str | None]:
    """Return an address for libpq without its password, and the password."""
    parameters = parse_dsn(address)
    password = parameters.pop("password", None)
    return make_dsn(**parameters), password


# The connection that a thread is opening at the moment.
_opening = threading.local()


def _split_hosts(address: str) -> list[dict[str, str]]:
    """Return the parameters of the connection to each of its hosts, in their order."""
    parameters: dict[str, str] = parse_dsn(address)
    names = [name for name in ("host", "hostaddr", "port") if name in parameters]
    lists = {name: parameters[name].split(",") for name in names}
    count = max(len(lists.get(name, "_")) for name in ("host", "hostaddr"))
    if any(len(values) not in (1, count) for values in lists.values()):
        return [parameters]  # libpq says what is wrong with it
    return [
        parameters | {name: values[at % len(values)] for name, values in lists.items()}
        for at in range(count)
    ]


def _connect(places: Sequence[dict[str, str]]) -> DriverConnection:
    """Connect to the first that can be used.

    One by one, as libpq does not go on from a host that ends the connection at once, which is what
    a forwarded port does before a server that is dead.
    """
    guarded: GuardedConnection | None = getattr(_opening, "connection", None)
    options = _OPTIONS | {"application_name": guarded.name if guarded else _NAME}
    failures: list[str] = []
    for place in places:
        try:
            driver: DriverConnection = psycopg2.connect(**(place | options))
            break
        except psycopg2.OperationalError as error:
            failures.append(str(error).strip())
    else:
        raise psycopg2.OperationalError("\n".join(failures))
    if guarded:
        # Before the dialect's own first queries, during which the database may fall silent too.
        guarded.adopt(driver)
    return driver


def _set_locally(connection: Connection) -> None:
    connection.exec_driver_sql(_SETTINGS)


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """Yield a connection for a command or a start, and commit; raise DatabaseError if it fails."""
    try:
        with engine.connect() as connection:
            yield connection
            _commit(connection)
    except (DBAPIError, psycopg2.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise DatabaseError(" ".join(str(cause).split())) from error
    except DoubtfulCommit as error:
        raise DatabaseError(str(error)) from error


def _commit(connection: Connection) -> None:
    driver = connection.connection.driver_connection
    assert driver is not None
    del driver.notices[:]
    connection.commit()
    require_silence(driver)


def require_silence(driver: DriverConnection) -> None:
    """Raise DoubtfulCommit if a COMMIT brought a notice, whatever it says in whatever language."""
    if driver.notices:
        notice = driver.notices[0].strip()
        raise DoubtfulCommit(f"the outcome of a commit is unknown: {notice}")


@contextmanager
def raw_cursor(connection: Connection) -> Iterator[Cursor]:
    """Yield a cursor that begins no transaction: it sends BEGIN itself, together with more.

    Fails in a transaction. A transaction in which the block fails is rolled back.
    """
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.autocommit = True
    with driver.cursor() as cursor:
        try:
            yield cursor
        except BaseException:
            if driver.info.transaction_status in _OPEN:
                with suppress(psycopg2.Error):
                    cursor.execute("ROLLBACK")
            raise
        finally:
            if driver.info.transaction_status == TRANSACTION_STATUS_IDLE:
                driver.autocommit = False


class GuardedConnection:
    """One lasting connection, used by one thread, that another thread can cut.

    A backend that is frozen keeps its client waiting for ever: `statement_timeout` is the backend's
    own, and psycopg2's `cancel()` would hold the interpreter's lock. Shutting down the connection's
    socket ends the wait at once.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float] = time.monotonic,
        on_error: OnError | None = None,
        outages: OutageLog | None = None,
    ) -> None:
        self.name = f"{_NAME} {secrets.token_hex(6)}"
        self._engine = engine
        self._outages = outages
        self._clock = clock
        self._on_error = on_error
        self._connection: Connection | None = None
        self._socket: socket.socket | None = None
        self._seconds = 0.0
        self._cut_at = math.inf
        self._lock = threading.Lock()
        self._began_at = 0.0
        self._is_broken_off = False
        # True if a transaction was broken off and its backend may still run.
        self._left_one = False

    def open_another(self) -> Self:
        """Return a connection to the same database, for another thread."""
        return type(self)(self._engine, self._clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def connected(self, seconds: float) -> Iterator[Connection]:
        """Yield the open connection for at most `seconds`, and commit.

        They begin anew once it is open: the hosts of an address are tried one after the other.

        Raises Unavailable if it cannot be opened, breaks or is cut, or if the backend of one that
        did so still commits; NodeFailed if another node fails, or after `break_off`. Conflict,
        Refused, Fault and a node's own failure leave it usable; after any other error a new one is
        opened next time.
        """
        self._seconds, self._is_broken_off = seconds, False
        self._began_at = self._clock()
        self._cut_at = self._began_at + seconds
        try:
            with translated_errors():
                connection = self._connection or self._open()
                yield connection
                _commit(connection)
            self._note_success()
        except (Conflict, Refused, Fault, NodeFailed) as error:
            self._note_success()
            self._report(error)
            self._roll_back()
            raise
        except BaseException as error:
            self._report(error)
            self._left_one = self._left_one or self._connection is not None
            self.close()
            if self._is_broken_off and isinstance(error, Unavailable):
                raise NodeFailed("a transaction was broken off") from error
            if self._outages is not None and isinstance(error, Unavailable):
                self._outages.note_failure(self, error.__cause__ or error)
            raise
        finally:
            with self._lock:
                self._cut_at = math.inf
            if self._is_broken_off:
                self.close()

    def _roll_back(self) -> None:
        try:
            if self._connection is not None:
                self._connection.rollback()
        except (psycopg2.Error, DBAPIError):
            self.close()

    def _note_success(self) -> None:
        if self._outages is not None:
            self._outages.note_success(self)

    def _report(self, error: BaseException) -> None:
        if self._on_error is not None:
            self._on_error(name_kind(error))

    def _open(self) -> Connection:
        _opening.connection = self
        try:
            self._connection = self._engine.connect()
        finally:
            _opening.connection = None
        if self._left_one:
            if self._connection.scalar(_FIND_LEFT, {"name": self.name}):
                raise Unavailable("a commit that was broken off goes on in the database")
            self._connection.rollback()  # whoever uses it begins its own transaction
            self._left_one = False
        return self._connection

    def adopt(self, driver: DriverConnection) -> None:
        """Note the connection that is being opened, so that it can be cut."""
        with self._lock:
            # A descriptor of its own: the driver's may be closed and reused at any moment.
            self._socket = socket.socket(fileno=dup(driver.fileno()))
            self._cut_at = self._clock() + self._seconds

    def cut_if_overdue(self) -> bool:
        """Cut the connection if its user has overstayed; return whether it was cut."""
        with self._lock:
            overdue = self._clock() >= self._cut_at
            if overdue:
                self._cut()
        return overdue

    def break_off(self, seconds: float) -> None:
        """Cut the connection if it has been used for `seconds`: its user waits for a lost node."""
        with self._lock:
            if self._cut_at < math.inf and self._clock() - self._began_at >= seconds:
                self._is_broken_off = True
                self._cut()

    def _cut(self) -> None:
        if self._socket is not None:
            self._cut_at = math.inf
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Discard the connection, whatever its state. Only for the thread that uses it."""
        with self._lock:
            connection, self._connection = self._connection, None
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        if connection is not None:
            with suppress(psycopg2.Error, DBAPIError):
                connection.invalidate()
                connection.close()

    def ping(self) -> None:
        """Ask whether the database can be written; raise Unavailable if not, or not in time."""
        with self.connected(PING_TIMEOUT_SECONDS) as connection, raw_cursor(connection) as cursor:
            # In one message: each process asks twice a second, however idle it is.
            cursor.execute(f"BEGIN; {_SETTINGS} {_FIND_OBSTACLE}", {"name": _NAME})
            (obstacle,) = cursor.fetchone() or (None,)
            if obstacle:
                server = cursor.connection.info
                # Not kept: behind the same name, the next connection may reach another server.
                raise Obstacle(obstacle, server.host, server.port)
            cursor.execute("COMMIT")

    def wait_until_available(self, stop: threading.Event) -> bool:
        """Ping until it works, and return True; return False once `stop` is set."""
        while not stop.is_set():
            try:
                self.ping()
            except Unavailable:
                stop.wait(_RETRY_SECONDS)
            except Exception:  # noqa: BLE001 - the caller can do nothing but wait on
                _log.exception("the database cannot be probed")
                stop.wait(_RETRY_SECONDS)
            else:
                return True
        return False
