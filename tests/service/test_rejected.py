"""What validation rejected is kept with its reason, shown, and taken again when it is told to."""

import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from hypothesis import given

from productgraph.v1.event_pb2 import Event as EventMessage
from server.events.json_codec import JsonCodec
from server.events.json_parser import encode_document, parse_document, parse_exactly
from server.events.schema import EVENT_SCHEMA
from tests.support.clients import Refusal, Tenant, frame, open_tenant
from tests.support.events import JSON, to_message
from tests.support.services import Service, run_command, running_service, wait_until

_TYPES = ", ".join(EVENT_SCHEMA.fields[3].rules.allowed_values)
UNKNOWN_TYPE = f"event.type: unknown type 'ui.hover', must be one of {_TYPES}"


def read_kept(tenant: Tenant) -> list[tuple[int, str, str, int, bytes]]:
    """Return a project's rejected events: id, protocol, reason, size, event; oldest first."""
    with tenant.database.cursor() as cursor:
        cursor.execute(
            "SELECT id, protocol, reason, size, event FROM rejected_events WHERE project_id = %s"
            " ORDER BY id",
            [tenant.project.id],
        )
        return [(*row[:4], bytes(row[4])) for row in cursor.fetchall()]


def wait_for_kept(tenant: Tenant, count: int) -> list[tuple[int, str, str, int, bytes]]:
    """Return the same, once there are as many as wanted."""
    wait_until(lambda: len(read_kept(tenant)) >= count)
    kept = read_kept(tenant)
    assert len(kept) == count
    return kept


def run(service: Service, arguments: str, status: int = 0) -> list[str]:
    """Return the lines that `productgraph rejected` prints; if it fails, its errors."""
    done = service.run("rejected", *arguments.split())
    assert done.returncode == status, done.stderr
    assert not (
        done.stderr if status == 0 else done.stdout.replace("0 accepted, 0 rejected again\n", "")
    )
    return (done.stderr if status else done.stdout).splitlines()


def reject(tenant: Tenant, **changes: object) -> dict[str, Any]:
    """Has an event rejected over HTTP, by its type unless by something else; returns it."""
    event = tenant.make_event({"event.type": "ui.hover"} | changes)
    assert tenant.post_events([event])["rejected"] == 1
    return event


def test_rejected_events_over_http_are_kept_with_reasons(tenant: Tenant) -> None:
    """Over HTTP, each rejected event is kept as its JSON value with its reason, and no other is."""
    events: list[Any] = [
        tenant.make_event({"event.type": "ui.hover", "plan": {"seats": 3, "é": [None, 1.5]}}),
        tenant.make_event(),
        tenant.make_event({"event_id": ""}),
        "no event",
        tenant.make_event({"duration_ms": "soon"}),
    ]
    outcome = tenant.post_events(events)
    kept = wait_for_kept(tenant, 4)
    assert [reason for _, _, reason, _, _ in kept] == [e["error"] for e in outcome["errors"]]
    assert [json.loads(event) for *_, event in kept] == [events[i] for i in (0, 2, 3, 4)]
    assert all((protocol, size) == ("http", len(event)) for _, protocol, _, size, event in kept)


def test_rejected_events_over_grpc_are_kept_byte_by_byte(tenant: Tenant) -> None:
    """Over gRPC, rejected events are kept byte by byte."""
    unknown = frame(3000, b"\xff")
    frames = [
        to_message(tenant.make_event({"event.type": "ui.hover"})).SerializeToString() + unknown,
        b"\xff\xff",
        to_message(tenant.make_event()).SerializeToString(),
        frame(3, b"\xff"),
    ]
    assert tenant.ingest(frames)["rejected"] == 3
    kept = wait_for_kept(tenant, 3)
    assert [event for *_, event in kept] == [frames[0], frames[1], frames[3]]
    assert {protocol for _, protocol, *_ in kept} == {"grpc"}


@pytest.mark.parametrize(
    "value",
    [
        "123456789012345678901234567890",
        "1" * 5000,
        "1e999",
        "-1e999",
        "0.1",
        r'"\ud83d\u0000"',
        "[" * 60 + "]" * 60,
    ],
    ids=lambda text: text[:10],
)
def test_odd_json_is_kept_with_its_meaning(value: str, tenant: Tenant) -> None:
    """What JSON's fast parsers cannot hold is kept as it is read, and means the same again."""
    sent = json.dumps(tenant.make_event({"metadata": {"x": "VALUE"}})).replace('"VALUE"', value)
    bad = sent.replace('"custom"', '"ui.hover"')
    assert tenant.post(b'{"events":[' + bad.encode() + b"]}").json["rejected"] == 1
    [(*_, event)] = wait_for_kept(tenant, 1)
    codec = JsonCodec(EVENT_SCHEMA)
    [read_first] = codec.parse_batch(b'{"events":[' + bad.encode() + b"]}").events
    [read_again] = codec.parse_batch(b'{"events":[' + event + b"]}").events
    assert read_again == read_first


@given(JSON)
def test_any_json_survives_being_kept(value: object) -> None:
    """Whatever JSON was read is written so that the same is read again."""
    for parse in (parse_exactly, parse_document):
        document = parse(json.dumps(value).encode())
        assert parse(encode_document(document.raw)).value == document.value


def test_a_rejected_event_keeps_digits_of_unread_integers(tenant: Tenant) -> None:
    """An integer keeps its digits also in an event that is rejected before they are looked at."""
    bad = json.dumps(tenant.make_event({"event.type": 5, "metadata": {"x": 10**29 + 1}}))
    assert tenant.post(b'{"events":[' + bad.encode() + b"]}").json["rejected"] == 1
    [(*_, event)] = wait_for_kept(tenant, 1)
    assert json.loads(event) == json.loads(bad)


def test_a_bottomless_event_is_kept_to_a_depth(tenant: Tenant) -> None:
    """An event that nests thousands of levels deep is kept down to a depth no valid event has."""
    deep = json.dumps(tenant.make_event({"metadata": "DEEP"}))
    body = deep.replace('"DEEP"', '{"x":' * 900 + "1" + "}" * 900).encode()
    assert tenant.post(b'{"events":[' + body + b"]}").json["rejected"] == 1
    [(_, _, reason, _, event)] = wait_for_kept(tenant, 1)
    assert reason == "metadata: nested more than 32 levels deep"
    assert event.count(b'{"x":') == 63


def test_the_first_100_kb_of_large_events_are_kept(tenant: Tenant) -> None:
    """Of an event over 100 KB the first 100 KB are kept, and it is said how large it was."""
    reject(tenant, **{"event.type": "custom", "page.title": "a" * 200_000})
    [(number, _, reason, size, event)] = wait_for_kept(tenant, 1)
    assert reason == "event: larger than 102400 bytes"
    assert (len(event), size > 200_000) == (102_400, True)
    shown = run(tenant.service, f"show {number}")
    assert shown[1] == "Only its first 102400 bytes were kept."
    assert run(tenant.service, f"replay {number}") == ["0 accepted, 1 rejected again"]
    [(_, _, reason, _, _)] = read_kept(tenant)
    assert reason == "event: kept in part, and cannot be replayed"


def test_nothing_is_kept_without_a_valid_key(tenant: Tenant) -> None:
    """Nothing is kept of a request without a valid key, over both protocols."""
    before = count_all(tenant)
    event = tenant.make_event({"event.type": "ui.hover"})
    assert tenant.post({"events": [event]}, x_pg_api_key=None).status == 401
    with pytest.raises(Refusal, match="UNAUTHENTICATED"):
        tenant.call(frame(1, to_message(event).SerializeToString()), key=None)
    reject(tenant)
    wait_for_kept(tenant, 1)
    assert count_all(tenant) == before + 1


def count_all(tenant: Tenant) -> int:
    """How many rows the table has, of all projects."""
    with tenant.database.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM rejected_events")
        return int(cursor.fetchone()[0])  # type: ignore[index]


def test_a_foreign_event_is_kept_for_the_key(tenant: Tenant) -> None:
    """An event that names another project is kept for the project of the key."""
    event = reject(tenant, project_id="proj_somebody_else", **{"event.type": "custom"})
    [(_, _, reason, _, kept)] = wait_for_kept(tenant, 1)
    assert (reason, json.loads(kept)) == ("project_id: does not match the API key", event)


def test_rejected_events_are_listed_with_reasons_newest_first(tenant: Tenant) -> None:
    """The list shows a project's rejected events with their reasons, the newest first."""
    for number in range(3):
        reject(tenant, event_id=f"evt_{number}")
    reject(tenant, event_id=None)
    numbers = [number for number, *_ in wait_for_kept(tenant, 4)]
    lines = run(tenant.service, f"list --project {tenant.project.id} --limit 2")
    assert [line.split()[0] for line in lines] == [str(number) for number in reversed(numbers[2:])]
    assert lines[0].endswith("event_id: required")
    assert lines[1].endswith(UNKNOWN_TYPE)
    assert len(run(tenant.service, "list")) > 2
    assert run(tenant.service, "list --project proj_none") == []


def test_shown_json_does_not_control_the_terminal(tenant: Tenant) -> None:
    """JSON is shown in full, one field a line, and nothing in it controls the terminal."""
    event = reject(tenant, **{"page.title": "é \x1b[31m \u009b31m \u202e"})
    [(number, *_)] = wait_for_kept(tenant, 1)
    about, *lines = run(tenant.service, f"show {number}")
    assert about.endswith(UNKNOWN_TYPE)
    assert json.loads("\n".join(lines).replace(r"\x9b", "\u009b")) == event
    assert '  "page.title": "é \\u001b[31m \\x9b31m \\u202e"' in [
        line.rstrip(",") for line in lines
    ]


@pytest.mark.parametrize(
    ("encoded", "shown"),
    [
        (EventMessage(session_id="s\x1b é").SerializeToString(), r'session_id: "s\033 é"'),
        (frame(3, b"s\xff"), r'3: "s\377"'),
        (b"\xff\xff", "ff ff"),
    ],
)
def test_rejected_protobuf_is_shown_as_text(encoded: bytes, shown: str, tenant: Tenant) -> None:
    """Protobuf is shown as text, by its fields' numbers or as bytes where it is not readable."""
    assert tenant.ingest([encoded])["rejected"] == 1
    [(number, *_)] = wait_for_kept(tenant, 1)
    assert run(tenant.service, f"show {number}")[1:] == [shown]


def test_showing_a_missing_rejected_event_is_an_error(service: Service) -> None:
    """A number that is not there is an error of one line."""
    for command in ("show 4000000000", "replay 4000000000"):
        assert run(service, command, 1) == ["productgraph: no rejected event 4000000000"]


def mend(tenant: Tenant, old: str, new: str) -> None:
    """Has the kept events be valid, as they would be by a rule that was relaxed."""
    with tenant.database.cursor() as cursor:
        cursor.execute(
            "UPDATE rejected_events SET event ="
            " decode(replace(encode(event, 'hex'), %s, %s), 'hex') WHERE project_id = %s",
            [old.encode().hex(), new.encode().hex(), tenant.project.id],
        )


def reject_over_both(tenant: Tenant) -> None:
    """Has one event rejected over each protocol, which differ in their ids."""
    reject(tenant, event_id="evt_http", page={"n": 1})
    event = to_message(tenant.make_event({"event_id": "evt_grpc", "event.type": "ui.hover"}))
    assert tenant.ingest([event])["rejected"] == 1
    wait_for_kept(tenant, 2)


def test_valid_events_are_replayed_once_and_leave_the_list(tenant: Tenant) -> None:
    """What is valid by now is stored for its project, once, and leaves the list; the rest stays."""
    reject_over_both(tenant)
    reject(tenant, event_id=None)
    *_, (left, *_) = wait_for_kept(tenant, 3)
    mend(tenant, "ui.hover", "ui.focus")
    tenant.post_events([tenant.make_event({"event_id": "evt_http", "event.type": "custom"})])
    command = f"replay --all --project {tenant.project.id}"
    assert run(tenant.service, command) == ["2 accepted, 1 rejected again"]
    rows = {row["event_id"]: row["event_type"] for row in tenant.read_rows()}
    assert rows == {"evt_http": "custom", "evt_grpc": "ui.focus"}
    assert [number for number, *_ in read_kept(tenant)] == [left]
    assert run(tenant.service, command) == ["0 accepted, 1 rejected again"]


def test_only_the_chosen_events_are_replayed(tenant: Tenant) -> None:
    """Only those asked for are replayed, and a number that is not there is told."""
    reject_over_both(tenant)
    (first, *_), (second, *_) = read_kept(tenant)
    mend(tenant, "ui.hover", "ui.focus")
    elsewhere = f"replay --project proj_none {first}"
    assert run(tenant.service, elsewhere, 1) == [f"productgraph: no rejected event {first}"]
    assert run(tenant.service, f"replay {second}") == ["1 accepted, 0 rejected again"]
    assert [row["event_id"] for row in tenant.read_rows()] == ["evt_grpc"]
    assert [number for number, *_ in read_kept(tenant)] == [first]


def test_an_event_rejected_again_has_the_new_reason(tenant: Tenant) -> None:
    """What is rejected again has the reason of the last time."""
    reject(tenant)
    [(number, *_)] = wait_for_kept(tenant, 1)
    mend(tenant, "ui.hover", "ui.swipe")
    assert run(tenant.service, f"replay {number}") == ["0 accepted, 1 rejected again"]
    [(again, _, reason, *_)] = read_kept(tenant)
    assert again == number
    assert reason.startswith("event.type: unknown type 'ui.swipe', ")


def test_what_cannot_be_replayed_keeps_nothing_else_from_it(tenant: Tenant) -> None:
    """Events that are too many values together, or no JSON, are replayed around."""
    heavy = json.dumps(tenant.make_event({"event.type": "x", "v": [0] * 45_000})).encode()
    good = json.dumps(tenant.make_event({"event_id": "evt_good"})).encode()
    with tenant.database.cursor() as cursor:
        for event in (*[heavy] * 12, b'{"events', good):
            cursor.execute(
                "INSERT INTO rejected_events"
                " (project_id, received_at, protocol, reason, size, event)"
                " VALUES (%s, now(), 'http', 'x', %s, %s)",
                [tenant.project.id, len(event), event],
            )
    command = f"replay --all --project {tenant.project.id}"
    assert run(tenant.service, command) == ["1 accepted, 13 rejected again"]
    assert [row["event_id"] for row in tenant.read_rows()] == ["evt_good"]
    assert any("invalid JSON" in reason for _, _, reason, *_ in read_kept(tenant))


def test_a_replayed_event_goes_to_the_providers(tenant: Tenant) -> None:
    """A replayed event goes to the analytics providers like any other."""
    reject(tenant)
    [(number, *_)] = wait_for_kept(tenant, 1)
    mend(tenant, "ui.hover", "ui.focus")
    enabled = {"ANALYTICS_ENABLED": "true", "MIXPANEL_ENABLED": "true", "MIXPANEL_TOKEN": "t"}
    settings = dict(tenant.service.settings) | enabled
    done = run_command("rejected", "replay", str(number), settings=settings)
    assert done.stdout == "1 accepted, 0 rejected again\n"
    with tenant.database.cursor() as cursor:
        cursor.execute(
            "DELETE FROM outbox_payloads p USING outbox_deliveries d WHERE d.payload_id = p.id"
            " AND p.project_id = %s RETURNING d.provider, p.event_count",
            [tenant.project.id],
        )
        assert cursor.fetchall() == [("mixpanel", 1)]


def test_requests_do_not_wait_for_rejected_events(tenant: Tenant) -> None:
    """While rejected events cannot be written, requests that have some are answered at once."""
    with closing(psycopg2.connect(tenant.service.database_url)) as other:
        other.cursor().execute("LOCK TABLE rejected_events IN ACCESS EXCLUSIVE MODE")
        events = [tenant.make_event(), tenant.make_event({"event.type": "ui.hover"})]
        for _ in range(5):
            assert tenant.post_events(events)["rejected"] == 1
            assert tenant.ingest([EventMessage()])["rejected"] == 1
        assert len(tenant.read_rows()) == 1
    wait_for_kept(tenant, 10)


@pytest.mark.slow
def test_rejected_events_are_written_before_the_end(create_migrated: Callable[[], str]) -> None:
    """What waits to be kept at SIGTERM is kept before the end."""
    with (
        running_service({"DATABASE_URL": create_migrated()}) as service,
        open_tenant(service) as tenant,
    ):
        events = [tenant.make_event({"event.type": "ui.hover"})] * 1000
        for _ in range(3):
            assert tenant.post_events(events)["rejected"] == 1000
        assert service.stop() == 0
        assert len(read_kept(tenant)) == 3000
