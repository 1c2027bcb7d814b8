"""What tells the fate of an event: ids of rejected and dead ones, and since when it is known."""

from alembic import op

revision = "0006"
down_revision = "0005"

# `enabled_since` is from when on every event that is stored is also kept for a provider; null if
# services without it run. Deliveries of events received until `purged_until` may have been purged.
PROVIDERS = """
CREATE TABLE forward_history (
    provider      text PRIMARY KEY,
    enabled_since timestamptz,
    purged_until  timestamptz
)
"""


def upgrade() -> None:
    """Add the columns, null for what is there already, and the table.

    An event that is retried keeps the time at which it was received; its age counts from the retry.
    """
    for table in ("rejected_events", "dead_events"):
        op.execute(f'ALTER TABLE {table} ADD COLUMN event_id text COLLATE "C"')
        op.execute(f"CREATE INDEX ON {table} (event_id) WHERE event_id IS NOT NULL")
    op.execute("ALTER TABLE outbox_payloads ADD COLUMN retried_at timestamptz")
    op.execute(PROVIDERS)
