"""What projects use, as the console tells it and as the primary key knows it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from server.console import questions
from server.console.questions import Usage
from server.storage.connection import Engine, connected, open_engine
from server.storage.event_queries import EventFilter, EventQueries

ADD = text("""
INSERT INTO events (project_id, event_id, session_id, event_type, event_timestamp)
SELECT :project, CAST(n AS text), 's', 'custom', :moment FROM generate_series(1, :count) AS n
""")
SCANS = text("""
SELECT coalesce(sum(seq_scan), 0), coalesce(sum(idx_scan), 0) FROM pg_stat_user_tables
 WHERE relname ^@ 'events_'
""")


@pytest.fixture
def filled(create_migrated: Callable[[], str]) -> Engine:
    """Return a database with the events of two projects on several days."""
    engine = open_engine(create_migrated())
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    with connected(engine) as connection:
        for project, age, count in (
            ("a", 0, 5),
            ("a", 6, 7),
            ("a", 7, 100),
            ("b", 1, 20),
            ("b", -1, 50),
        ):
            moment = today + timedelta(days=-age, hours=1)
            connection.execute(ADD, {"project": project, "moment": moment, "count": count})
    return engine


def test_usage_ranks_projects_by_their_last_days(filled: Engine) -> None:
    """Projects come by their events of seven days, with those of today, by the events' own time."""
    with connected(filled) as connection:
        answer = Usage().ask(connection)
    assert answer == {
        "days": 7,
        "count": 2,
        "events": 32,
        "projects": [
            {"project": "b", "events": 20, "today": 0},
            {"project": "a", "events": 12, "today": 5},
        ],
    }


def test_the_largest_projects_alone_are_shown(
    filled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a number of projects the smaller ones are only counted."""
    monkeypatch.setattr(questions, "_MAX_PROJECTS", 1)
    with connected(filled) as connection:
        answer = Usage().ask(connection)
    assert [each["project"] for each in answer["projects"]] == ["b"]
    assert (answer["count"], answer["events"]) == (2, 32)


def test_usage_that_takes_too_long_is_not_known(
    filled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no period can be counted in time, the answer says so and shows nothing wrong."""
    monkeypatch.setattr(questions, "_USAGE_SECONDS", 0.2)
    with connected(filled) as holder, connected(filled) as connection:
        holder.execute(text("LOCK TABLE events"))
        assert Usage().ask(connection) == {"days": 0, "count": 0, "events": 0, "projects": []}


def test_counts_without_types_read_no_table(filled: Engine) -> None:
    """Counted by project and day, the index is scanned alone, and the sum is that of all rows."""

    def read_scans() -> tuple[int, int]:
        with connected(filled) as connection:
            connection.execute(text("SELECT pg_stat_force_next_flush()"))
        with connected(filled) as connection:
            sequential, indexed = connection.execute(SCANS).one()
        return sequential, indexed

    before = read_scans()
    with connected(filled) as connection:
        queries = EventQueries(connection)
        period = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
        by_day = queries.count(["project", "day"], EventFilter(), *period)
        by_project = queries.count(["project"], EventFilter("b"), *period)
        connection.execute(text("SELECT pg_stat_force_next_flush()"))
    after = read_scans()
    assert after[0] == before[0]
    assert after[1] > before[1]
    assert by_project == [{"project": "b", "events": 70}]
    with connected(filled) as connection:
        whole = connection.scalar(text("SELECT count(*) FROM events"))
    assert sum(row["events"] for row in by_day) == whole == 182
