"""What a transaction can fail with: the driver's errors, translated into ours."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg2
from psycopg2 import errors as driver_errors
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from server.errors import Unavailable


class DatabaseError(Exception):
    """The database cannot be used; the text is one line for an operator, without passwords."""


class DoubtfulCommit(Unavailable):
    """A commit may be lost with its server, although it succeeded there."""


class Obstacle(Unavailable):
    """The database at `host` and `port` answers, but confirms no write; the text says why."""

    def __init__(self, text: str, host: str, port: int) -> None:
        super().__init__(text)
        self.host = host
        self.port = port


class NodeFailed(Unavailable):
    """Another node of the cluster failed, so that nothing was stored; ours goes on.

    The outcome is unknown if the transaction was broken off because of that node.
    """

    def __init__(self, reason: str) -> None:
        super().__init__("the storage of this project is unavailable")
        self.reason = reason
        self.add_note(reason)  # for the log; the text is for the caller


class Conflict(Exception):
    """The transaction met another one's and was rolled back: it can be run again at once."""


class RowLocked(Conflict):
    """A row of the transaction is not to be had for a while: another transaction holds it."""


class Refused(Exception):
    """PostgreSQL refuses the data itself; running the transaction again cannot help.

    `code` names the driver's error.
    """

    def __init__(self, code: str, constraint: str = "") -> None:
        super().__init__(f"{code} {constraint}".strip())
        self.code = code


class Fault(Exception):
    """A statement failed for a reason that is neither the data's nor an outage's.

    `code` is PostgreSQL's. The connection is still good.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code = code

    @property
    def is_internal(self) -> bool:
        """Whether PostgreSQL, or an extension such as Citus, calls it an error of its own."""
        return self.code == "XX000"


# How a failed transaction is counted; all kinds there are.
_KINDS: dict[type[BaseException], str] = {
    Conflict: "conflict",
    Refused: "refused",
    Unavailable: "unavailable",
}
OTHER_ERROR = "other"
# How the name of a constraint begins that keeps rows off a month whose partition is being made.
AWAITED_MONTH = "awaits_"
ERROR_KINDS = (*_KINDS.values(), OTHER_ERROR)

# Takes the kind of a failed transaction. Must not block.
OnError = Callable[[str], None]

_PLACE_OF_ROW = re.compile(r'[^"\n]*\(\d+,\d+\)')
# Whatever the quotes of a language look like.
_QUOTED_NAME = re.compile(r"[^\w\s]\w.*?[^\w\s]")
_CONFLICTS = (
    driver_errors.DeadlockDetected,
    driver_errors.SerializationFailure,
    driver_errors.LockNotAvailable,
)
_UNDEFINED_TABLE = "42P01"
# A server that our server is a client of cannot be reached, or does not let it in.
_NODE_CODES = ("08000", "08001", "08003", "08004", "08006")
# What Citus says of a node that is lost in the middle of COPY, with the code of an I/O error.
_LOST_IN_COPY = re.compile(r"failed to (COPY to shard \d+|complete COPY) on ")
_OUTAGES = (
    psycopg2.OperationalError,
    psycopg2.InterfaceError,
    driver_errors.ReadOnlySqlTransaction,
)


def name_kind(error: BaseException) -> str:
    """Return the kind by which a transaction's error is counted."""
    return next((name for kind, name in _KINDS.items() if isinstance(error, kind)), OTHER_ERROR)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn the driver's errors into Conflict, Refused, Fault or Unavailable, or kinds of these."""
    try:
        yield
    except (psycopg2.Error, DBAPIError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if _waited_for_row(cause) or _awaits_its_partition(cause):
            raise RowLocked from error
        if isinstance(cause, _CONFLICTS) or _lost_its_partition(cause):
            raise Conflict from error
        if isinstance(cause, _OUTAGES) and _failed_on_node(cause):
            # As below, the rest of the driver's text may repeat the data.
            raise NodeFailed(cause.diag.message_primary or "") from None
        if isinstance(cause, _OUTAGES) or _lost_its_server(cause):
            raise Unavailable("storage is unavailable") from error
        if isinstance(cause, psycopg2.DataError | psycopg2.IntegrityError):
            # The driver's text may repeat the data.
            raise Refused(type(cause).__name__, cause.diag.constraint_name or "") from None
        if isinstance(cause, psycopg2.Error) and cause.pgcode:
            # As above, this is the driver's context; the message itself is fixed, or an operator's.
            raise Fault(cause.pgcode, cause.diag.message_primary or "") from None
        raise
    except PendingRollbackError as error:  # the connection broke within a transaction
        raise Unavailable("storage is unavailable") from error


@contextmanager
def tolerated_drop() -> Iterator[None]:
    """End a block quietly if a table or index that it names was dropped meanwhile."""
    try:
        yield
    except DBAPIError as error:
        if not isinstance(error.orig, driver_errors.UndefinedTable):
            raise
    except Fault as fault:
        if fault.code != _UNDEFINED_TABLE:
            raise


def _failed_on_node(cause: psycopg2.Error) -> bool:
    """Return whether our server reports the failure of another one, and goes on itself.

    What libpq reports has no code, and what ends our connection is no mere error.
    """
    return cause.diag.severity_nonlocalized == "ERROR" and bool(
        cause.pgcode in _NODE_CODES
        or _came_from_node(cause)
        or _LOST_IN_COPY.match(cause.diag.message_primary or "")
    )


def _lost_its_server(cause: BaseException | None) -> bool:
    """Return whether the connection broke in a way that the driver has no class for.

    If a server dies while libpq still writes to it, the error has no code and is no
    OperationalError, since libpq does not yet call the connection bad.
    """
    return type(cause) is psycopg2.DatabaseError and cause.pgcode is None


def _waited_for_row(cause: BaseException | None) -> bool:
    """Return whether a lock was waited for because of a row, rather than a table.

    Then the first line of the context, in whatever language, says where the row is, such as
    'while inserting index tuple (0,3) in relation "events_2024_01"'; no other line does so before
    its first quote.
    """
    return isinstance(cause, driver_errors.LockNotAvailable) and bool(
        _PLACE_OF_ROW.match(cause.diag.context or "")
    )


def _awaits_its_partition(cause: BaseException | None) -> bool:
    """Return whether a row is of a month whose partition is being made."""
    return isinstance(cause, driver_errors.CheckViolation) and (
        (cause.diag.constraint_name or "").startswith(AWAITED_MONTH)
        or (_came_from_node(cause) and f'"{AWAITED_MONTH}' in (cause.diag.message_primary or ""))
    )


def _lost_its_partition(cause: BaseException | None) -> bool:
    """Return whether a row was on its way to the default partition when its month got its own.

    PostgreSQL reports it as a check violation there, of no named constraint.
    """
    return isinstance(cause, driver_errors.CheckViolation) and (
        (cause.diag.table_name == "events_default" and not cause.diag.constraint_name)
        or (_came_from_node(cause) and _names_no_constraint(cause))
    )


def _names_no_constraint(cause: driver_errors.CheckViolation) -> bool:
    """Return whether the message has one name alone, that of the table."""
    return len(_QUOTED_NAME.findall(cause.diag.message_primary or "")) == 1


def _came_from_node(cause: psycopg2.Error) -> bool:
    """Return whether Citus passes on the error of a node, without the names of its table."""
    return "while executing command on " in (cause.diag.context or "")
