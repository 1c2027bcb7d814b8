"""What of a database matters in production, read in one go."""

from dataclasses import dataclass
from datetime import date, datetime

from sqlalchemy import Connection, Engine, text

from server.storage.connection import connected
from server.storage.partitions import MONTHS_AHEAD, months_from

_READ = text("""
SELECT role.rolsuper AS is_superuser,
       inet_server_addr() IS NULL AS is_local,
       coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false) AS is_encrypted,
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('synchronous_standby_names') <> '' AS has_synchronous_standby,
       current_setting('fsync') = 'on' AS has_fsync,
       current_setting('full_page_writes') = 'on' AS has_full_page_writes,
       current_setting('autovacuum') = 'on' AS has_autovacuum,
       (SELECT array_agg(c.relname ORDER BY c.relname) FROM pg_inherits
          JOIN pg_class c ON c.oid = inhrelid WHERE inhparent = 'events'::regclass) AS partitions
  FROM pg_roles role WHERE role.rolname = current_user
""")
_READ_PROCESS = text("SELECT pg_backend_pid()")


@dataclass(frozen=True)
class DatabaseFacts:
    """How the service's account finds the database; `partitions` are names."""

    is_superuser: bool
    is_local: bool
    is_encrypted: bool
    synchronous_commit: str
    has_synchronous_standby: bool
    has_fsync: bool
    has_full_page_writes: bool
    has_autovacuum: bool
    partitions: list[str]

    def list_missing_months(self, today: date) -> list[str]:
        """Return the partitions that the service should have made by now."""
        names = [f"events_{start:%Y_%m}" for start, _ in months_from(today, MONTHS_AHEAD + 1)]
        return [name for name in names if name not in self.partitions]

    def find_oldest_month(self) -> str | None:
        """Return the name of the oldest month's partition."""
        return min((name for name in self.partitions if name != "events_default"), default=None)


def read_facts(connection: Connection) -> DatabaseFacts:
    """Read the facts."""
    return DatabaseFacts(**connection.execute(_READ).mappings().one())


def keeps_transactions_whole(engine: Engine) -> bool:
    """Return whether a transaction stays on one connection.

    Raises DatabaseError if there are no transactions, as behind a pooler that shares statements.
    """
    with connected(engine) as connection, connection.begin():
        first = connection.scalar(_READ_PROCESS)
        return bool(connection.scalar(_READ_PROCESS) == first)


def describe_month(partition: str) -> datetime:
    """Return the first day of a month's partition."""
    return datetime.strptime(partition, "events_%Y_%m")  # noqa: DTZ007 - a month, no moment
