"""The outbox: events kept until every analytics provider has them."""

from alembic import op

revision = "0002"
down_revision = "0001"

# The events of one project and one commit, as EncodedEvents: few large rows instead of one for each
# event. Already dense, they are not worth compressing.
PAYLOADS = """
CREATE TABLE outbox_payloads (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    project_id      text NOT NULL,
    received_at     timestamptz NOT NULL DEFAULT now(),
    mapping_version integer NOT NULL,
    event_count     integer NOT NULL,
    events          bytea NOT NULL
)
"""

# What one provider still has to get of a payload. `due_at` is when it may be claimed: a claim moves
# it ahead, so that the rows of a forwarder that died come back by themselves.
DELIVERIES = """
CREATE TABLE outbox_deliveries (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payload_id  bigint NOT NULL,
    provider    text NOT NULL,
    due_at      timestamptz NOT NULL DEFAULT now(),
    attempts    integer NOT NULL DEFAULT 0,
    event_count integer NOT NULL,
    positions   integer[],
    lease       uuid
)
"""

DEAD_EVENTS = """
CREATE TABLE dead_events (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    provider        text NOT NULL,
    project_id      text NOT NULL,
    reason          text NOT NULL,
    answer          text NOT NULL,
    mapping_version integer NOT NULL,
    event           bytea NOT NULL,
    received_at     timestamptz NOT NULL,
    died_at         timestamptz NOT NULL DEFAULT now()
)
"""

LANES = """
CREATE TABLE forward_lanes (
    provider       text PRIMARY KEY,
    delivered      bigint NOT NULL DEFAULT 0,
    stopped_reason text,
    stopped_at     timestamptz
)
"""

# A queue's tables turn over completely: vacuum them by the thousand rows, not by their share.
AUTOVACUUM = """
ALTER TABLE {table} SET (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
    autovacuum_vacuum_cost_delay = 0
)
"""


def upgrade() -> None:
    """Create the outbox, the dead letters and the lanes' state."""
    for statement in (PAYLOADS, DELIVERIES, DEAD_EVENTS, LANES):
        op.execute(statement)
    op.execute("ALTER TABLE outbox_payloads ALTER COLUMN events SET STORAGE EXTERNAL")
    op.execute("CREATE INDEX ON outbox_deliveries (provider, due_at, id)")
    op.execute("CREATE INDEX ON outbox_deliveries (payload_id)")
    op.execute("CREATE INDEX ON dead_events (provider, id)")
    for table in ("outbox_payloads", "outbox_deliveries"):
        op.execute(AUTOVACUUM.format(table=table))
