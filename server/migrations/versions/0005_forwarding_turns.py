"""Whose each delivery is, so that projects take turns, and how each lane fares."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the project to each delivery and what `forward status` shows to each lane.

    Deliveries of a service of the version before have no project: they take turns as one.
    """
    op.execute("ALTER TABLE outbox_deliveries ADD COLUMN project_id text NOT NULL DEFAULT ''")
    op.execute("CREATE INDEX ON outbox_deliveries (provider, project_id, due_at, id)")
    for column in (
        "seen_at timestamptz",
        "failing_since timestamptz",
        "last_error text",
        "last_error_at timestamptz",
        "next_try_at timestamptz",
    ):
        op.execute(f"ALTER TABLE forward_lanes ADD COLUMN {column}")
