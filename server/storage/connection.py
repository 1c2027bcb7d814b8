"""The connections to PostgreSQL: opened alike, in one transaction mode, and cut if they hang."""

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import dup
from typing import Self

import psycopg2
from psycopg2.extensions import (
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_INERROR,
    TRANSACTION_STATUS_INTRANS,
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
    Fault,
    OnError,
    Refused,
    name_kind,
    translated_errors,
)
from server.storage.outages import OutageLog

CONNECT_TIMEOUT_SECONDS = 2  # libpq's shortest
PING_TIMEOUT_SECONDS = 1.5
_RETRY_SECONDS = 0.2

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
# `default_transaction_read_only` is left alone: it is how a server is made read-only.
_SETTINGS = f"""
{SEARCH_PATH}
{KEEPALIVES}
SET LOCAL idle_in_transaction_session_timeout = 60000;
SET LOCAL standard_conforming_strings = on;
SET LOCAL datestyle = 'ISO';
SET LOCAL timezone = 'UTC';
"""

_IS_READ_ONLY = text(
    "SELECT pg_is_in_recovery() OR CAST(current_setting('transaction_read_only') AS boolean)"
)
_READ_ONLY = "the database is a standby, or read-only"
_OPEN = (TRANSACTION_STATUS_INTRANS, TRANSACTION_STATUS_INERROR)

_log = logging.getLogger("productgraph.database")


def open_engine(url: str) -> Engine:
    """Return an engine whose connections time out when opened.

    All have one mode: the first statement begins a transaction, `commit` ends it. Of startup
    parameters only the encoding is sent: PgBouncer keeps it, and would refuse others.
    """
    engine = create_engine(
        url,
        poolclass=NullPool,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
        use_native_hstore=False,  # would cost a query at the first connection
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "application_name": "productgraph",
            "client_encoding": "UTF8",  # the texts' own, whatever PGCLIENTENCODING or the role say
            "keepalives_idle": 30,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        },
    )
    # Before the dialect's own first queries, during which the database may fall silent too.
    event.listen(engine, "connect", _introduce, insert=True)
    event.listen(engine, "begin", _set_locally)
    return engine


# The connection that a thread is opening at the moment.
_opening = threading.local()


def _introduce(driver: DriverConnection, _record: object) -> None:
    if connection := getattr(_opening, "connection", None):
        connection.adopt(driver)


def _set_locally(connection: Connection) -> None:
    connection.exec_driver_sql(_SETTINGS)


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """Yield a connection for a command or a start, and commit; raise DatabaseError if it fails."""
    try:
        with engine.connect() as connection:
            yield connection
            connection.commit()
    except (DBAPIError, psycopg2.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise DatabaseError(" ".join(str(cause).split())) from error


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
        self._engine = engine
        self._outages = outages
        self._clock = clock
        self._on_error = on_error
        self._connection: Connection | None = None
        self._socket: socket.socket | None = None
        self._cut_at = math.inf
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def connected(self, seconds: float) -> Iterator[Connection]:
        """Yield the open connection for at most `seconds`, and commit.

        Raises Unavailable if it cannot be opened, breaks or is cut. Conflict, Refused and Fault
        leave it usable; after any other error a new one is opened next time.
        """
        self._cut_at = self._clock() + seconds
        try:
            with translated_errors():
                connection = self._connection or self._open()
                yield connection
                connection.commit()
            self._note_success()
        except (Conflict, Refused, Fault) as error:
            self._note_success()
            self._report(error)
            self._roll_back(connection)
            raise
        except BaseException as error:
            if self._outages is not None and isinstance(error, Unavailable):
                self._outages.note_failure(self, error.__cause__)
            self._report(error)
            self.close()
            raise
        finally:
            with self._lock:
                self._cut_at = math.inf

    def _roll_back(self, connection: Connection) -> None:
        try:
            connection.rollback()
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
        return self._connection

    def adopt(self, driver: DriverConnection) -> None:
        """Note the connection that is being opened, so that it can be cut."""
        with self._lock:
            # A descriptor of its own: the driver's may be closed and reused at any moment.
            self._socket = socket.socket(fileno=dup(driver.fileno()))

    def cut_if_overdue(self) -> bool:
        """Cut the connection if its user has overstayed; return whether it was cut."""
        with self._lock:
            overdue = self._clock() >= self._cut_at
            if overdue and self._socket is not None:
                self._cut_at = math.inf
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        return overdue

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
        with self.connected(PING_TIMEOUT_SECONDS) as connection:
            # Not kept: behind the same name, the next connection may reach another server.
            if connection.scalar(_IS_READ_ONLY):
                raise Unavailable(_READ_ONLY)

    def wait_until_available(self, stop: threading.Event) -> bool:
        """Ping until it works, and return True; return False once `stop` is set."""
        is_logged = False
        while not stop.is_set():
            try:
                self.ping()
            except Unavailable as error:
                if str(error) == _READ_ONLY and not is_logged:
                    is_logged = True
                    _log.warning(_READ_ONLY, extra={"database_host": self._engine.url.host})
                stop.wait(_RETRY_SECONDS)
            except Exception:  # noqa: BLE001 - the caller can do nothing but wait on
                _log.exception("the database cannot be probed")
                stop.wait(_RETRY_SECONDS)
            else:
                return True
        return False
