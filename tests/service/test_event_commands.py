"""`productgraph events` shows what was stored, and what it exports can be sent in again."""

import csv
import io
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.clients import Tenant, accepted
from tests.support.services import clean_environment, wait_until

NOW = datetime.now(UTC).replace(microsecond=123000)


def run(tenant: Tenant, *arguments: str, status: int = 0) -> str:
    """Return what `productgraph events` prints for this tenant's project."""
    done = tenant.service.run("events", *arguments, "--project", tenant.project.id)
    assert done.returncode == status, done.stderr
    return done.stdout


def read_json(printed: str) -> list[dict[str, Any]]:
    """Return the objects of JSON lines."""
    return [json.loads(line) for line in printed.split("\n") if line]


def make_event(tenant: Tenant, number: int = 0, **changes: object) -> dict[str, Any]:
    """Make an event of a few minutes ago."""
    moment = (NOW - timedelta(minutes=number)).isoformat().replace("+00:00", "Z")
    return tenant.make_event({"event_id": f"evt_{number}", "event.timestamp": moment, **changes})


def test_tail_shows_the_last_arrivals_in_order(tenant: Tenant) -> None:
    """`tail` shows the newest by arrival, whatever their own time is, the last one at the end."""
    for number in range(4):
        tenant.post_events([make_event(tenant, number)])
    shown = read_json(run(tenant, "tail", "--limit", "3", "--json"))
    assert [event["event_id"] for event in shown] == ["evt_1", "evt_2", "evt_3"]
    lines = run(tenant, "tail").splitlines()
    assert len(lines) == 4
    assert all(tenant.project.id in line and "custom" in line for line in lines)


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("--type", "event.type", "page.view"),
        ("--session", "session.id", "sess_2"),
        ("--user", "user.id", "user_2"),
    ],
)
def test_tail_can_be_narrowed(tenant: Tenant, option: str, name: str, value: str) -> None:
    """Each option leaves only the events that have the value."""
    tenant.post_events([make_event(tenant, 1), make_event(tenant, 2, **{name: value})])
    [found] = read_json(run(tenant, "tail", option, value, "--json"))
    assert found[name] == value


def test_tail_cannot_be_made_to_control_a_terminal(tenant: Tenant) -> None:
    """Control characters of an event are escaped."""
    tenant.post_events([make_event(tenant, 1, **{"page.path": "/\x1b[2J\n\x07"})])
    [line] = run(tenant, "tail").splitlines()
    assert "\\x1b[2J\\n\\x07" in line


def test_following_shows_each_arrival_once(tenant: Tenant) -> None:
    """`tail --follow` shows what is there and then what arrives, each event once."""
    tenant.post_events([make_event(tenant, 1)])
    arguments = ["events", "tail", "--follow", "--json", "--project", tenant.project.id]
    with subprocess.Popen(
        [sys.executable, "-m", "server", *arguments],
        env=clean_environment(tenant.service.settings) | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as following:
        try:
            assert following.stdout is not None
            assert json.loads(following.stdout.readline())["event_id"] == "evt_1"
            for number in (2, 3):
                tenant.post_events([make_event(tenant, number)])
                assert json.loads(following.stdout.readline())["event_id"] == f"evt_{number}"
            following.send_signal(2)
            assert following.stdout.read() == ""
            assert following.wait(30) == 0
        finally:
            following.kill()


def test_count_counts_by_project_type_and_day(tenant: Tenant) -> None:
    """`count` has a row for each group, of the period that is asked for."""
    yesterday = (NOW - timedelta(days=1)).isoformat()
    tenant.post_events(
        [
            make_event(tenant, 1),
            make_event(tenant, 2, **{"event.type": "error"}),
            make_event(tenant, 3, **{"event.type": "error", "event.timestamp": yesterday}),
        ]
    )
    by_type = read_json(run(tenant, "count", "--by", "type", "--json"))
    assert by_type == [{"type": "custom", "events": 1}, {"type": "error", "events": 2}]
    by_day = read_json(run(tenant, "count", "--by", "day", "--type", "error", "--json"))
    assert {row["day"]: row["events"] for row in by_day}[yesterday[:10]] >= 1
    assert sum(row["events"] for row in by_day) == 2
    assert (
        read_json(run(tenant, "count", "--since", "1h", "--by", "project", "--json"))[0]["project"]
        == tenant.project.id
    )
    head, *rows = run(tenant, "count").splitlines()
    assert head.split() == ["PROJECT", "TYPE", "EVENTS"]
    assert [row.split()[1:] for row in rows] == [["custom", "1"], ["error", "2"]]


def test_usage_adds_up_to_the_rows(tenant: Tenant) -> None:
    """`usage` counts by project, day and type what is stored, from the beginning of a UTC day."""
    times = ["2024-01-15T00:00:00Z", "2024-01-15T23:59:59Z", "2024-01-16T00:30:00+02:00"]
    events = [make_event(tenant, n, **{"event.timestamp": time}) for n, time in enumerate(times)]
    earlier = make_event(tenant, 9, **{"event.timestamp": "2024-01-14T23:59:59Z"})
    tenant.post_events([*events, earlier])

    def count(*options: str) -> str:
        chosen = ("--project", tenant.project.id, "--since", "2024-01-15T12:00Z", *options)
        done = tenant.service.run("usage", *chosen)
        assert done.returncode == 0, done.stderr
        return done.stdout

    day = {"project": tenant.project.id, "day": "2024-01-15", "events": 3}
    assert read_json(count("--json")) == [day]
    assert read_json(count("--json", "--by", "type")) == [{"type": "custom", "events": 3}]
    everything = read_json(count("--json", "--since", "1970-01-01"))
    assert sum(row["events"] for row in everything) == len(tenant.read_rows()) == 4
    assert count().splitlines()[0].split() == ["PROJECT", "DAY", "EVENTS"]


def test_an_export_is_complete_and_ordered(tenant: Tenant) -> None:
    """More than a page of events are exported, each once, by time, in both formats."""
    events = [make_event(tenant, number) for number in range(6000)]
    for start in range(0, len(events), 1000):
        assert tenant.post_events(events[start : start + 1000])["rejected"] == 0
    exported = read_json(run(tenant, "export", "--since", "7d"))
    assert exported == list(reversed(events))
    rows = list(csv.DictReader(io.StringIO(run(tenant, "export", "--since=7d", "--format=csv"))))
    assert [row["event_id"] for row in rows] == [event["event_id"] for event in exported]
    since, until = events[20]["event.timestamp"], events[10]["event.timestamp"]
    part = read_json(run(tenant, "export", "--since", since, "--until", until))
    assert part == list(reversed(events[11:21]))


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "page.title": TEXTS,
        "event.sequence": st.integers(-(2**63), 2**63 - 1),
        "api.status_code": st.integers(-(2**31), 2**31 - 1),
        "metadata": OBJECTS,
        "org.id": TEXTS,
        "plan": VALUES,
    },
)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batch=st.lists(FIELDS, min_size=1, max_size=20))
def test_what_is_exported_can_be_sent_in_again(tenant: Tenant, batch: list[Any]) -> None:
    """Exported events that are deleted and sent in again leave the same rows."""
    tenant.take_rows()
    events = [make_event(tenant, number, **fields) for number, fields in enumerate(batch)]
    assert tenant.post_events(events) == accepted(len(events))
    exported = read_json(run(tenant, "export", "--since", "7d"))
    rows = tenant.take_rows()
    assert tenant.post_events(exported) == accepted(len(events))
    assert tenant.take_rows() == rows


@pytest.mark.parametrize(
    "arguments",
    [
        ["tail", "--since", "soon"],
        ["tail", "--limit", "0"],
        ["count", "--by", "colour"],
        ["export"],
        ["export", "--since", "7d", "--format", "xml"],
        ["count", "--since", "9999999999d"],
    ],
)
def test_wrong_questions_are_refused(tenant: Tenant, arguments: list[str]) -> None:
    """A question that makes no sense is wrong usage."""
    run(tenant, *arguments, status=2)


def test_a_slow_question_is_ended_with_advice(tenant: Tenant) -> None:
    """A query that takes too long is cancelled, and the message says what to change."""
    with tenant.database.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
        try:
            done = tenant.service.run("events", "count", "--timeout", "1")
        finally:
            cursor.execute("ROLLBACK")
    assert done.returncode == 1
    assert "no answer within 1 s" in done.stderr
    wait_until(lambda: tenant.post({"events": [make_event(tenant)]}).status == 202)
