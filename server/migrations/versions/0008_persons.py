"""The receipts of deletions, and the blocked persons."""

from alembic import op

revision = "0008"
down_revision = "0007"

# Ids are kept as HMACs under a secret that is not in the database; `secret_mark` tells which one.
DELETIONS = """
CREATE TABLE person_deletions (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    project_id    text COLLATE "C" NOT NULL,
    digests       bytea[] NOT NULL,
    secret_mark   bytea NOT NULL,
    began_at      timestamptz NOT NULL DEFAULT now(),
    deleted       jsonb NOT NULL DEFAULT '{}',
    deleted_at    timestamptz,
    deleted_again jsonb NOT NULL DEFAULT '{}',
    finished_at   timestamptz,
    unreadable    jsonb NOT NULL DEFAULT '{}'
)
"""
BLOCKED = """
CREATE TABLE blocked_persons (
    project_id  text COLLATE "C" NOT NULL,
    digest      bytea NOT NULL,
    secret_mark bytea NOT NULL,
    blocked_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (project_id, digest)
)
"""


def upgrade() -> None:
    """Create both tables."""
    op.execute(DELETIONS)
    op.execute("CREATE INDEX ON person_deletions (project_id, id)")
    op.execute(BLOCKED)
