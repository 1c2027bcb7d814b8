"""The connections to PostgreSQL: opened, cut when they hang, their errors translated."""

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import dup

import psycopg2
from psycopg2 import errors as driver_errors
from psycopg2.extensions import connection as DriverConnection
from sqlalchemy import Connection as Connection
from sqlalchemy import Engine as Engine
from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.exc import DBAPIError

from server.errors import Unavailable

CONNECT_TIMEOUT_SECONDS = 2  # libpq's shortest
PING_TIMEOUT_SECONDS = 1.5
_RETRY_SECONDS = 0.2

_log = logging.getLogger("productgraph.database")


class DatabaseError(Exception):
    """The database cannot be used; the text is one line for an operator, without passwords."""


class Conflict(Exception):
    """The transaction met another one's and was rolled back: it can be run again at once."""


class Refused(Exception):
    """PostgreSQL refuses the data itself; running the transaction again cannot help."""


# How a transaction that failed is counted; all kinds there are.
_KINDS: dict[type[BaseException], str] = {
    Conflict: "conflict",
    Refused: "refused",
    Unavailable: "unavailable",
}
OTHER_ERROR = "other"
ERROR_KINDS = (*_KINDS.values(), OTHER_ERROR)

# Called with the kind of a failed transaction; it may not wait.
OnError = Callable[[str], None]

_CONFLICTS = (
    driver_errors.DeadlockDetected,
    driver_errors.SerializationFailure,
    driver_errors.LockNotAvailable,
)
_OUTAGES = (
    psycopg2.OperationalError,
    psycopg2.InterfaceError,
    driver_errors.ReadOnlySqlTransaction,
)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turns the driver's errors into Conflict, Refused or Unavailable; others pass as they are."""
    try:
        yield
    except (psycopg2.Error, DBAPIError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(cause, _CONFLICTS) or _lost_its_partition(cause):
            raise Conflict from error
        if isinstance(cause, _OUTAGES) or _lost_its_server(cause):
            raise Unavailable("storage is unavailable") from error
        if isinstance(cause, psycopg2.DataError | psycopg2.IntegrityError):
            # What the driver says of data may repeat it.
            raise Refused(f"{type(cause).__name__} {cause.diag.constraint_name or ''}") from None
        raise


def _lost_its_server(cause: BaseException | None) -> bool:
    """Whether the connection broke in a way that the driver has no class for.

    A server that dies while libpq still writes to it: the error has no code, and is no
    OperationalError, for libpq does not yet call the connection bad.
    """
    return type(cause) is psycopg2.DatabaseError and cause.pgcode is None


def _lost_its_partition(cause: BaseException | None) -> bool:
    """Whether a row was on its way to the default partition when its month got one of its own.

    That is a check violation there, of no constraint with a name.
    """
    return (
        isinstance(cause, driver_errors.CheckViolation)
        and cause.diag.table_name == "events_default"
        and not cause.diag.constraint_name
    )


def open_engine(url: str) -> Engine:
    """An engine whose connections commit each statement by itself and time out when opened.

    No startup options are sent, which PgBouncer would refuse.
    """
    engine = create_engine(
        url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,
        use_native_hstore=False,  # would cost a query at the first connection
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "application_name": "productgraph",
            "keepalives_idle": 30,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        },
    )
    # Before the dialect's own first queries, during which the database may fall silent too.
    event.listen(engine, "connect", _introduce, insert=True)
    return engine


def transactional(engine: Engine) -> Engine:
    """The same engine, with connections on which `begin` starts a transaction."""
    return engine.execution_options(isolation_level="READ COMMITTED")


# The link that a thread is opening at the moment.
_opening = threading.local()


def _introduce(driver: DriverConnection, _record: object) -> None:
    if link := getattr(_opening, "link", None):
        link.adopt(driver)


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """A connection for a command or a start; raises DatabaseError where anything fails."""
    try:
        with engine.connect() as connection:
            yield connection
    except DBAPIError as error:
        raise DatabaseError(" ".join(str(error.orig).split())) from error


class Link:
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
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._on_error = on_error
        self._connection: Connection | None = None
        self._socket: socket.socket | None = None
        self._cut_at = math.inf
        self._lock = threading.Lock()

    @contextmanager
    def connected(self, seconds: float) -> Iterator[Connection]:
        """The open connection, for so many seconds at the most.

        Raises Unavailable where it cannot be opened, breaks or is cut; Conflict and Refused leave
        it usable, after any other error a new one is opened next time.
        """
        self._cut_at = self._clock() + seconds
        try:
            with translated_errors():
                connection = self._connection or self._open()
                yield connection
                connection.commit()  # ends what SQLAlchemy may have begun by itself
        except (Conflict, Refused) as error:
            self._tell(error)
            connection.rollback()
            raise
        except BaseException as error:
            self._tell(error)
            self.close()
            raise
        finally:
            with self._lock:
                self._cut_at = math.inf

    def _tell(self, error: BaseException) -> None:
        if self._on_error is not None:
            self._on_error(_KINDS.get(type(error), OTHER_ERROR))

    def _open(self) -> Connection:
        _opening.link = self
        try:
            self._connection = self._engine.connect()
        finally:
            _opening.link = None
        return self._connection

    def adopt(self, driver: DriverConnection) -> None:
        """Takes note of the connection that is being opened, so that it can be cut."""
        with self._lock:
            # A descriptor of its own: the driver's may be closed and reused at any moment.
            self._socket = socket.socket(fileno=dup(driver.fileno()))

    def cut_if_overdue(self) -> bool:
        """Cuts the connection if its user has overstayed; says whether it did."""
        with self._lock:
            overdue = self._clock() >= self._cut_at
            if overdue and self._socket is not None:
                self._cut_at = math.inf
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        return overdue

    def close(self) -> None:
        """Discards the connection, whatever its state. Only for the thread that uses it."""
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
        """Runs a query; raises Unavailable where that fails or takes too long."""
        with self.connected(PING_TIMEOUT_SECONDS) as connection:
            connection.execute(text("SELECT 1"))

    def wait_until_available(self, stop: threading.Event) -> bool:
        """Pings until it works, and says True, or until `stop` is set."""
        while not stop.is_set():
            try:
                self.ping()
            except Unavailable:
                stop.wait(_RETRY_SECONDS)
            except Exception:  # noqa: BLE001 - whoever waits here has nobody to tell
                _log.exception("the database cannot be probed")
                stop.wait(_RETRY_SECONDS)
            else:
                return True
        return False


class Watchdog:
    """A thread that runs quick checks twenty times a second, among them the cutting of links."""

    INTERVAL_SECONDS = 0.05

    def __init__(self, *checks: Callable[[], object]) -> None:
        self._checks = checks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Starts checking."""
        self._thread.start()

    def stop(self) -> None:
        """Stops checking; returns when the thread has ended."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.INTERVAL_SECONDS):
            for check in self._checks:
                try:
                    check()
                except Exception:  # noqa: BLE001 - the dog outlives whatever a check may do
                    _log.exception("a watchdog's check failed")


class Readiness:
    """Whether the database answered a query within the last two seconds."""

    MAX_AGE_SECONDS = 2.0
    _INTERVAL_SECONDS = 0.5

    def __init__(self, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock
        self._answered_at = -math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="readiness", daemon=True)

    def start(self) -> None:
        """Starts probing the database."""
        self._thread.start()

    def is_ready(self) -> bool:
        """False too once the service is shutting down; never waits."""
        fresh = self._clock() - self._answered_at < self.MAX_AGE_SECONDS
        return fresh and not self._stop.is_set()

    def check(self) -> None:
        """For the watchdog: cuts a probe that hangs."""
        self._link.cut_if_overdue()

    def stop(self) -> None:
        """Unready from now on."""
        self._stop.set()

    def _run(self) -> None:
        while self._link.wait_until_available(self._stop):
            self._answered_at = self._clock()
            self._stop.wait(self._INTERVAL_SECONDS)
        self._link.close()
