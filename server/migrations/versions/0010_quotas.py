"""The quotas of projects, and what is used of them."""

from alembic import op

revision = "0010"
down_revision = "0009"

# Null: no limit.
QUOTAS = """
CREATE TABLE quotas (
    project_id text PRIMARY KEY,
    daily      bigint,
    monthly    bigint
)
"""
# A row for each period (`daily` or `monthly`) that began on a day (UTC). `used` has what workers
# have taken in advance, too; `warned_for` is the quota for which it was said that it is near its
# end. Rows are updated often, each within its page.
USES = """
CREATE TABLE quota_uses (
    project_id text NOT NULL,
    period     text NOT NULL,
    began      date NOT NULL,
    used       bigint NOT NULL DEFAULT 0,
    warned_for bigint,
    PRIMARY KEY (project_id, period, began)
) WITH (fillfactor = 50)
"""


def upgrade() -> None:
    """Create both tables."""
    op.execute(QUOTAS)
    op.execute(USES)
