"""The events that validation rejected, kept for a while."""

from alembic import op

revision = "0003"
down_revision = "0002"

# `event` is what was received, cut where it was very long; `size` is how long it was.
REJECTED_EVENTS = """
CREATE TABLE rejected_events (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    project_id  text COLLATE "C" NOT NULL,
    received_at timestamptz NOT NULL,
    protocol    text NOT NULL,
    reason      text NOT NULL,
    size        integer NOT NULL,
    event       bytea NOT NULL
)
"""


def upgrade() -> None:
    """Create the table, and the indexes by which it is kept short."""
    op.execute(REJECTED_EVENTS)
    op.execute("CREATE INDEX ON rejected_events (project_id, id)")
    op.execute("CREATE INDEX ON rejected_events (received_at)")
