"""The deletions of persons that analytics providers are asked for."""

from alembic import op

revision = "0009"
down_revision = "0008"

# `sealed` holds ids, encrypted under a secret that is not in the database, until the provider has
# taken the deletion. `due_at` is when it may be claimed, and null once nothing is left to do.
DELETIONS = """
CREATE TABLE provider_deletions (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    receipt_id    bigint NOT NULL,
    provider      text NOT NULL,
    state         text NOT NULL DEFAULT 'waiting',
    sealed        bytea,
    detail        text NOT NULL DEFAULT '',
    job           text,
    requested_at  timestamptz NOT NULL DEFAULT now(),
    accepted_at   timestamptz,
    ended_at      timestamptz,
    due_at        timestamptz DEFAULT now(),
    lease         uuid,
    attempts      integer NOT NULL DEFAULT 0,
    last_error    text,
    last_error_at timestamptz
)
"""


def upgrade() -> None:
    """Create the table, and note for each receipt and lane what it needs of that."""
    op.execute(DELETIONS)
    op.execute("CREATE INDEX ON provider_deletions (provider, due_at, id)")
    op.execute("CREATE INDEX ON provider_deletions (receipt_id)")
    op.execute("ALTER TABLE person_deletions ADD COLUMN providers text[] NOT NULL DEFAULT '{}'")
    # Not before the first, whatever forwarder asks; the second counts failures in a row.
    op.execute("ALTER TABLE forward_lanes ADD COLUMN deletions_after timestamptz")
    op.execute("ALTER TABLE forward_lanes ADD COLUMN deletion_failures integer NOT NULL DEFAULT 0")
