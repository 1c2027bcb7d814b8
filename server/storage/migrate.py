"""Brings a database's tables to the revision that this version of the service needs."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from server.storage.checkup import keeps_transactions_whole
from server.storage.connection import answers_without_transaction, connected
from server.storage.errors import DatabaseError
from server.storage.indexes import build_indexes, count_missing_indexes

# Held while migrating, so that several starts at once migrate one after the other.
_ADVISORY_LOCK = 0x7067_6576_656E_7473  # "pgevents"


class UnsuitableDatabase(DatabaseError):
    """The database is not what this version needs; the text says what to do."""


def migrate(engine: Engine) -> None:
    """Run the missing revisions, all or none, and build missing indexes. Raises DatabaseError.

    The tables of a newer version are left as they are.
    """
    _check_pooler(engine)
    with connected(engine) as connection:
        _check_encoding(connection)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        if _current_revision(connection) < _newest_revision():
            command.upgrade(_alembic_config(connection), "head")
    build_indexes(engine)


def check_migrated(engine: Engine) -> None:
    """Raise UnsuitableDatabase if the tables are older than this version needs.

    Newer ones are accepted: each revision leaves the version before it working.
    """
    _check_pooler(engine)
    with connected(engine) as connection:
        _check_encoding(connection)
        current, needed = _current_revision(connection), _newest_revision()
    if current < needed:
        found = f"at revision {current}" if current else "empty"
        raise UnsuitableDatabase(
            f"the database is {found}, revision {needed} is needed: run 'productgraph migrate'"
        )


def check_indexed(engine: Engine) -> None:
    """Raise UnsuitableDatabase if `migrate` has indexes to build; the service works without."""
    with connected(engine) as connection:
        missing = count_missing_indexes(connection)
    if missing:
        raise UnsuitableDatabase(
            f"{missing} partitions have no index on received_at: run 'productgraph migrate'"
        )


def _check_pooler(engine: Engine) -> None:
    try:
        if keeps_transactions_whole(engine):
            return
    except DatabaseError:
        if not answers_without_transaction(engine):
            raise
    raise UnsuitableDatabase(
        "the pooler before the database gives each statement another connection, so that there are"
        " no transactions: set its pool_mode to transaction or session"
    )


def _check_encoding(connection: Connection) -> None:
    encoding = connection.scalar(text("SHOW server_encoding"))
    if encoding != "UTF8":
        raise UnsuitableDatabase(f"the database's encoding is {encoding}, UTF8 is needed")


def _current_revision(connection: Connection) -> str:
    return max(MigrationContext.configure(connection).get_current_heads(), default="")


def _newest_revision() -> str:
    head = ScriptDirectory.from_config(_alembic_config()).get_current_head()
    assert head is not None
    return head


def _alembic_config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations"))
    config.attributes["connection"] = connection
    return config
