"""The events table, partitioned by month, and the table of API keys."""

from alembic import op

revision = "0001"
down_revision = None

# Text sorts by its bytes ("C"), as the service sorts what it writes: two writers that store the
# same events then take their locks in one order. Time stands before the id in the key to keep
# inserts at the right edge of the index, and the same index answers 'this project, this period'.
EVENTS = """
CREATE TABLE events (
    event_id                 text COLLATE "C" NOT NULL,
    project_id               text COLLATE "C" NOT NULL,
    session_id               text COLLATE "C" NOT NULL,
    event_type               text COLLATE "C" NOT NULL,
    event_timestamp          timestamptz NOT NULL,
    user_id                  text COLLATE "C",
    event_name               text COLLATE "C",
    event_sequence           bigint,
    page_path                text COLLATE "C",
    page_title               text COLLATE "C",
    page_url                 text COLLATE "C",
    page_referrer            text COLLATE "C",
    ui_component_name        text COLLATE "C",
    ui_component_path        text COLLATE "C",
    ui_component_type        text COLLATE "C",
    ui_action                text COLLATE "C",
    ui_element               text COLLATE "C",
    ui_element_text          text COLLATE "C",
    ui_state_key             text COLLATE "C",
    ui_state_before          text COLLATE "C",
    ui_state_after           text COLLATE "C",
    gen_ai_journey_id        text COLLATE "C",
    gen_ai_journey_step_id   text COLLATE "C",
    gen_ai_journey_step_name text COLLATE "C",
    api_method               text COLLATE "C",
    api_path                 text COLLATE "C",
    api_status_code          integer,
    api_duration_ms          bigint,
    error_type               text COLLATE "C",
    error_message            text COLLATE "C",
    error_stack              text COLLATE "C",
    duration_ms              bigint,
    metadata                 jsonb,
    attributes               jsonb,
    received_at              timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (project_id, event_timestamp, event_id)
) PARTITION BY RANGE (event_timestamp)
"""

# Only the digest of a key is kept: who reads this table cannot use what is in it.
API_KEYS = """
CREATE TABLE api_keys (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    project_id   text NOT NULL,
    name         text NOT NULL,
    digest       bytea NOT NULL UNIQUE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz,
    revoked_at   timestamptz
)
"""


def upgrade() -> None:
    """Create both tables, and the partition for events of months that have none."""
    op.execute(EVENTS)
    op.execute("CREATE TABLE events_default PARTITION OF events DEFAULT")
    op.execute(API_KEYS)
