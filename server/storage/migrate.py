"""Brings a database's tables to the revision that this version of the service needs."""

from pathlib import Path

from sqlalchemy import Connection, Engine, text

from server.storage.checkup import keeps_transactions_whole
from server.storage.citus import check_coordinator, is_distributed
from server.storage.connection import answers_without_transaction, connected
from server.storage.distribution import add_small_tables
from server.storage.errors import DatabaseError
from server.storage.indexes import build_indexes, count_missing_indexes

_MIGRATIONS = Path(__file__).parents[1] / "migrations"

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
        check_coordinator(connection)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        if _current_revision(connection) < _newest_revision():
            _upgrade(connection)
    build_indexes(engine)
    _add_new_tables(engine)


def _add_new_tables(engine: Engine) -> None:
    """Make the other nodes of a cluster know the tables that a revision has made."""
    with connected(engine) as connection:
        if is_distributed(connection):
            connection.commit()
            list(add_small_tables(connection))


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
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return ""
    return connection.scalar(text("SELECT max(version_num) FROM alembic_version")) or ""


def _newest_revision() -> str:
    return max(file.name[:4] for file in (_MIGRATIONS / "versions").glob("[0-9]*.py"))


def _upgrade(connection: Connection) -> None:
    # Alembic takes longer to import than all else here, and every process checks the revision.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
