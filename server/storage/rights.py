"""What the service's account must be allowed in a database whose tables belong to another one."""

from sqlalchemy import Connection, Engine, text

from server.storage.connection import connected
from server.storage.migrate import UnsuitableDatabase

# All tables of the owner of `events`, which is who runs the migrations. Events are written through
# the table that has the partitions, and only read from these.
_FIND_MISSING = text("""
SELECT string_agg(needed, ', ' ORDER BY needed) || ' on ' || relname AS missing
  FROM pg_class CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS needed
 WHERE relkind IN ('r', 'p') AND (relnamespace, relowner) =
       (SELECT relnamespace, relowner FROM pg_class WHERE oid = 'events'::regclass)
   AND (needed = 'SELECT' OR NOT (relispartition OR relname = 'alembic_version'))
   AND NOT has_table_privilege(pg_class.oid, needed)
 GROUP BY relname
UNION ALL
SELECT 'USAGE on outbox_payloads_id_seq'
 WHERE NOT has_sequence_privilege('outbox_payloads_id_seq', 'USAGE')
UNION ALL
SELECT 'TEMPORARY on the database' WHERE NOT has_database_privilege(current_database(), 'TEMPORARY')
 ORDER BY 1
""")
_NAME_ACCOUNT = text("SELECT current_user")
_SHOWN = 5


def find_missing_rights(connection: Connection) -> list[str]:
    """Return what the account lacks, such as `INSERT on events`."""
    return list(connection.scalars(_FIND_MISSING))


def check_rights(engine: Engine) -> None:
    """Raise UnsuitableDatabase if the account lacks a right that the service needs."""
    with connected(engine) as connection:
        missing = find_missing_rights(connection)
        account = connection.scalar(_NAME_ACCOUNT)
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UnsuitableDatabase(
            f"the account {account} lacks {'; '.join(missing[:_SHOWN])}{more}: run"
            " scripts/deploy/roles.sql, as OPERATIONS.md says under Roles"
        )
