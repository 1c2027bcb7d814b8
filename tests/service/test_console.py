"""The console over HTTP: what it shows, to whom, and that it shows nothing to anybody else."""

import json
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.clients import Tenant
from tests.support.console import BROWSER, PASSWORD, ask_console, make_credentials, spell
from tests.support.services import Service, ask, wait_until

PAGES = ["/", "/events", "/event?id=x", "/rejected", "/rejected/1", "/usage", "/keys"]
PATHS = [*PAGES, "/static/console.js", "/static/nothing", "/nothing"]


def make_event(tenant: Tenant, **changes: object) -> dict[str, Any]:
    """Make an event of this moment with an id of its own."""
    moment = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    names = {"event_id": f"evt_{uuid.uuid4()}", "event.timestamp": moment}
    return tenant.make_event({**names, **changes})


def read_json(service: Service, path: str, **parameters: object) -> Any:
    """Return what the console answers to programs; fail unless it has an answer."""
    answer = ask_console(service, spell(path, **parameters) if parameters else path)
    assert answer.status == 200, answer.body
    return answer.json


def find_ids(tenant: Tenant, **parameters: object) -> list[str]:
    """Return the ids of the newest events of a tenant's project."""
    wanted = {"project": tenant.project.id, **parameters}
    return [event["event_id"] for event in read_json(tenant.service, "/events", **wanted)["events"]]


def test_the_console_lists_arrivals_newest_first(tenant: Tenant) -> None:
    """Stored events are listed by their arrival, with their wire names."""
    events = [make_event(tenant, **{"page.path": f"/{number}"}) for number in range(3)]
    for event in events:
        tenant.post_events([event])
    wait_until(lambda: len(find_ids(tenant)) == 3)
    listed = read_json(tenant.service, "/events", project=tenant.project.id)["events"]
    assert [event.pop("received_at") is not None for event in listed] == [True] * 3
    assert listed == list(reversed(events))


def test_the_console_can_be_followed_without_gaps(tenant: Tenant) -> None:
    """Asked since `follow` of the last answer, it has what has arrived since."""
    tenant.post_events([make_event(tenant)])
    wait_until(lambda: find_ids(tenant))
    since = read_json(tenant.service, "/events", project=tenant.project.id)["follow"]
    later = make_event(tenant)
    tenant.post_events([later])
    wait_until(lambda: later["event_id"] in find_ids(tenant, since=since))


@pytest.mark.parametrize(
    ("parameter", "name", "value"),
    [
        ("type", "event.type", "page.view"),
        ("session", "session.id", "sess_2"),
        ("user", "user.id", "user_2"),
    ],
)
def test_the_console_shows_only_what_is_asked_for(
    tenant: Tenant, parameter: str, name: str, value: str
) -> None:
    """Each filter leaves only the events that have the value."""
    wanted = make_event(tenant, **{name: value})
    tenant.post_events([make_event(tenant), wanted])
    wait_until(lambda: len(find_ids(tenant)) == 2)
    assert find_ids(tenant, **{parameter: value}) == [wanted["event_id"]]


def test_large_events_are_listed_in_brief(tenant: Tenant) -> None:
    """However large events are, a list has the beginning of their texts, and no objects."""
    event = make_event(tenant, **{"error.stack": "x" * 90_000, "metadata": {"a": "y" * 5000}})
    tenant.post_events([event])
    wait_until(lambda: find_ids(tenant))
    [listed] = read_json(tenant.service, "/events", project=tenant.project.id)["events"]
    assert listed["error.stack"] == "x" * 255
    assert "metadata" not in listed


def test_a_searched_event_is_shown_whole_with_its_fate(tenant: Tenant) -> None:
    """An event is found by its id, and by its whole key, as it was sent and where it is."""
    event = make_event(tenant, **{"event.sequence": 2**63 - 1, "metadata": {"deep": [1, {"a": 2}]}})
    month = f"events_{datetime.now(UTC):%Y_%m}"
    wait_until(lambda: has_table(tenant, month))  # which a service adds when it has started
    tenant.post_events([event])
    names = {"id": event["event_id"]}
    key = {"project": tenant.project.id, "at": event["event.timestamp"]}
    for parameters in (names, names | key):
        [found] = read_json(tenant.service, "/event", **parameters)["stored"]
        assert found["event"] == event
        assert found["partition"] == month
        assert found["forwarding"] == []
    other = {**names, "project": tenant.project.id, "at": "2024-01-15T10:30:00Z"}
    assert ask_console(tenant.service, spell("/event", **other)).status == 404


def has_table(tenant: Tenant, name: str) -> bool:
    """Return whether the database has a table of this name."""
    with tenant.database.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)", [name])
        return cursor.fetchone() != (None,)


def test_rejected_events_are_grouped_by_their_reasons(tenant: Tenant) -> None:
    """Reasons that differ in a name only are one, with examples that show what was sent."""
    word = uuid.uuid4().hex
    # As many as to be among the largest groups, whatever others have sent to the shared service.
    events = [make_event(tenant, **{"event.type": f"ui.{word}.{number}"}) for number in range(100)]
    tenant.post_events(events)

    def find_group() -> dict[str, Any] | None:
        groups = read_json(tenant.service, "/rejected")["groups"]
        found = [group for group in groups if word in group["reason"]]
        assert len(found) <= 1
        return found[0] if found and found[0]["count"] >= 100 else None

    wait_until(find_group)
    group = find_group()
    assert group is not None
    shown = group["projects"]  # the first five: other tests of the shared service share the reason
    assert tenant.project.id in shown or (len(shown) == 5 and tenant.project.id > max(shown))
    [shown] = read_json(tenant.service, f"/rejected/{group['newest_ids'][0]}")["rejected"]
    assert json.loads(shown["event"]) == events[-1]
    assert word in shown["reason"]
    [found] = read_json(tenant.service, "/event", id=events[0]["event_id"])["rejected"]
    assert json.loads(found["event"]) == events[0]


def read_settled_totals(service: Service) -> dict[str, int]:
    """Return the totals once the worker has reported what other tests have sent."""
    seen: list[dict[str, int]] = [{}]

    def are_settled() -> bool:
        time.sleep(1.0)  # reports come twenty times a second
        seen.append(read_json(service, "/")["throughput"]["totals"])
        return seen[-1] == seen[-2]

    wait_until(are_settled)
    return seen[-1]


def test_the_overview_counts_what_was_sent(tenant: Tenant) -> None:
    """Stored, duplicate and rejected events are counted in the step in which they came."""
    before = read_settled_totals(tenant.service)
    events = [make_event(tenant) for _ in range(3)]
    tenant.post_events(events)
    tenant.post_events([*events[:2], make_event(tenant, **{"event.type": "none"})])

    def has_counted() -> bool:
        now = read_json(tenant.service, "/")["throughput"]
        assert sum(now["stored"]) <= now["totals"]["stored"]
        grown = {name: now["totals"][name] - before[name] for name in before}
        return grown == {"stored": 3, "duplicate": 2, "rejected": 1}

    wait_until(has_counted)
    service = read_json(tenant.service, "/")["service"]
    assert (service["workers"], service["is_database_up"]) == (1, True)


def test_the_console_lists_keys_without_their_secrets(tenant: Tenant) -> None:
    """A key is listed with its project and its limits, and with nothing that it could be had by."""
    made = tenant.service.run(
        *("keys", "create", "--project", tenant.project.id, "--name", "slow", "--rate", "7")
    )
    wait_until(lambda: find_keys(tenant, "slow"))
    [key] = find_keys(tenant, "slow")
    assert (key["event_rate"], key["byte_rate"], key["last_used_at"]) == (7, None, None)
    assert set(key) == {
        *("id", "project_id", "name", "created_at", "last_used_at", "revoked_at"),
        *("event_rate", "byte_rate", "expires_at", "retires_at", "replaces", "origins"),
        *("ends_at", "is_valid", "is_ending"),
    }
    assert made.stdout.strip() not in ask_console(tenant.service, "/keys").body.decode()


def test_the_console_lists_keys_about_to_end_first(tenant: Tenant) -> None:
    """A key that is in use and about to end comes before all others, and is counted."""
    old = "UPDATE api_keys SET last_used_at = now(), expires_at = now() + interval '3 d'"
    tenant.database.cursor().execute(f"{old} WHERE project_id = %s", [tenant.project.id])
    wait_until(lambda: any(key["is_ending"] for key in find_keys(tenant, "test")))
    listed = read_json(tenant.service, "/keys")
    ending = [key["is_ending"] for key in listed["keys"]]
    assert ending == sorted(ending, reverse=True)
    assert listed["ending"] == sum(ending)


def find_keys(tenant: Tenant, name: str) -> list[dict[str, Any]]:
    """Return the tenant's keys of this name."""
    return [
        key
        for key in read_json(tenant.service, "/keys")["keys"]
        if (key["project_id"], key["name"]) == (tenant.project.id, name)
    ]


@pytest.mark.parametrize("path", PAGES)
def test_browsers_get_the_page_and_programs_the_data(service: Service, path: str) -> None:
    """On one path, a browser gets the page, and whoever wants no HTML gets JSON."""
    page = ask_console(service, path, headers={"Accept": BROWSER})
    assert page.status == 200
    assert page.headers.get_content_type() == "text/html"
    for accept in (None, "*/*", "application/json", "image/png"):
        answer = ask_console(service, path, headers={"Accept": accept})
        assert answer.headers.get_content_type() == "application/json"
        assert answer.headers["Vary"] == "Accept"


@pytest.mark.parametrize(
    "credentials",
    [
        None,
        "",
        "Basic",
        "Basic !",
        "Basic " + "a" * 1000,
        make_credentials(""),
        make_credentials(PASSWORD[:-1]),
        make_credentials(PASSWORD + "\0"),
        make_credentials("\udcff".encode("utf-8", "surrogateescape").decode("latin-1")),
        make_credentials(PASSWORD).replace("Basic", "Bearer"),
    ],
)
def test_nothing_is_shown_without_the_password(service: Service, credentials: str | None) -> None:
    """No path of the console answers anything without the password, not even that it is there."""
    for path in PATHS:
        answer = ask_console(service, path, headers={"Authorization": credentials})
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "[::1", "10.0.0.1"])
def test_the_console_answers_only_under_its_own_names(service: Service, host: str) -> None:
    """Under another name the console shows nothing; metrics and probes answer under any."""
    for path in PATHS:
        assert ask_console(service, path, headers={"Host": host}).status == 421
    for path in ("/metrics", "/health", "/ready"):
        assert ask_console(service, path, headers={"Host": host}).status == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9464", "127.0.0.1:1", "[::1]:9464"])
def test_each_name_of_this_machine_reaches_the_console(service: Service, host: str) -> None:
    """The names of the loopback interface are good, with any port."""
    assert ask_console(service, "/", headers={"Host": host}).status == 200


def test_other_sites_pages_cannot_ask_the_console(service: Service) -> None:
    """A page of another site gets nothing from the browser's hand; a link from there works."""
    foreign: dict[str, str | None] = {"Sec-Fetch-Site": "cross-site"}
    for mode, status in (("no-cors", 403), ("cors", 403), ("navigate", 200)):
        answer = ask_console(service, "/", headers={**foreign, "Sec-Fetch-Mode": mode})
        assert answer.status == status
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_of_the_console_forbids_foreign_code(service: Service, path: str) -> None:
    """Each answer, errors too, has the policy that lets nothing run but the console's own files."""
    variants: list[dict[str, str | None]] = [{}, {"Accept": BROWSER}, {"Host": "evil.example"}]
    for headers in [*variants, dict[str, str | None](Authorization=None)]:
        answer = ask_console(service, path, headers=headers)
        policy = dict(
            part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
        )
        assert policy["default-src"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
        assert policy["frame-ancestors"] == "'none'"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "PROPFIND", "OPTIONS"])
def test_the_console_can_change_nothing(service: Service, method: str) -> None:
    """No path takes anything but GET and HEAD."""
    for path in PAGES:
        answer = ask_console(service, path, method)
        assert 200 <= answer.status < 500
        assert answer.status >= 400 or answer.body == b""


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/events?limit=0", 400),
        ("/events?limit=201", 400),
        ("/events?limit=many", 400),
        ("/events?since=soon", 400),
        ("/events?since=9999-12-31T23:59:59-12:00", 400),
        ("/events?project=%00", 400),
        ("/events?project=" + "x" * 256, 400),
        ("/event", 400),
        ("/event?id=", 400),
        ("/event?id=x&days=0", 400),
        ("/event?id=nobody-has-sent-it", 404),
        ("/rejected/0", 404),
        ("/rejected/x", 404),
        ("/rejected/9223372036854775807", 404),
        ("/rejected/9223372036854775808", 404),
        ("/static/../api.py", 404),
        ("/static/%2e%2e%2fapi.py", 404),
        ("/nothing", 404),
    ],
)
def test_wrong_questions_to_the_console_are_told_so(
    service: Service, path: str, status: int
) -> None:
    """A question that makes no sense, or is about nothing, has an error that says what is wrong."""
    answer = ask_console(service, path)
    assert answer.status == status
    assert len(answer.json["error"]) > 5


TEXTS = st.text(max_size=300) | st.sampled_from(["\0", "\ud800", "'", "0001-01-01", "1e9"])
NAMES = st.sampled_from(
    ["project", "type", "session", "user", "since", "limit", "id", "at", "days"]
)


@settings(
    max_examples=60,
    # The list takes the place of the profile's, which is for busy machines.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    path=st.sampled_from(["/events", "/event", "/rejected", "/keys", "/"]),
    parameters=st.dictionaries(NAMES, TEXTS, max_size=4),
)
def test_no_question_makes_the_console_fail(
    service: Service, path: str, parameters: dict[str, str]
) -> None:
    """Whatever is asked, the answer is no fault of the console's."""
    encoded = {name: text.encode("utf-8", "surrogatepass") for name, text in parameters.items()}
    assert ask_console(service, spell(path, **encoded)).status in (200, 400, 404)


def test_locked_tables_cost_the_console_alone(tenant: Tenant) -> None:
    """While a table is locked, the console says that it must wait, and metrics are answered."""
    with tenant.database.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE rejected_events IN ACCESS EXCLUSIVE MODE")
        try:
            wait_until(lambda: ask_console(tenant.service, "/rejected").status == 503)
            assert ask_console(tenant.service, "/").status == 200
            assert ask(tenant.service.metrics_url) == 200
        finally:
            cursor.execute("ROLLBACK")
    wait_until(lambda: ask_console(tenant.service, "/rejected").status == 200)
