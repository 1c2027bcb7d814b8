"""The ends, origins and successors of API keys, and the days of their use."""

from alembic import op

revision = "0007"
down_revision = "0006"

# Null: the key does not expire, has no successor, takes nobody's place, works from any origin. The
# `revoked_at` of a key that is replaced stays null: the version before would refuse it at once.
COLUMNS = (
    "expires_at timestamptz",
    "retires_at timestamptz",
    "replaces bigint",
    "origins text[]",
)
# The last use on each day (UTC).
USES = """
CREATE TABLE api_key_uses (
    key_id       bigint NOT NULL,
    day          date NOT NULL,
    last_used_at timestamptz NOT NULL,
    PRIMARY KEY (key_id, day)
)
"""


def upgrade() -> None:
    """Add the columns and the table."""
    for column in COLUMNS:
        op.execute(f"ALTER TABLE api_keys ADD COLUMN {column}")
    op.execute(USES)
