"""How much each API key may send a second."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the rates: null is the service's default, 0 none."""
    for column in ("event_rate", "byte_rate"):
        op.execute(f"ALTER TABLE api_keys ADD COLUMN {column} bigint CHECK ({column} >= 0)")
