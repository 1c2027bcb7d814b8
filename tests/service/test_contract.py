"""The documented HTTP API, line by line, as a client sees it."""

import gzip
import json

import pytest
from psycopg2.extensions import connection as Connection

from tests.support.clients import Answer, Tenant, accepted, create_revoked_key, send
from tests.support.projects import Project, create_project
from tests.support.services import Service

MEGABYTE = 1 << 20
ORIGIN = "https://shop.example"

# The bodies of the documentation's curl commands, character by character.
EXAMPLES = {
    "page view": r"""{
    "events": [{
      "event_id": "evt_001",
      "project_id": "proj_demo",
      "session.id": "sess_abc123",
      "event.type": "page.view",
      "event.timestamp": "2024-01-15T10:30:00Z",
      "page.path": "/products",
      "page.title": "Products"
    }]
  }""",
    "button click": r"""{
    "events": [{
      "event_id": "evt_002",
      "project_id": "proj_demo",
      "session.id": "sess_abc123",
      "event.type": "ui.click",
      "event.timestamp": "2024-01-15T10:30:15Z",
      "page.path": "/products",
      "ui.component.name": "AddToCartButton",
      "ui.component.path": "ProductPage/ProductCard/AddToCartButton",
      "ui.action": "click",
      "ui.element.text": "Add to Cart"
    }]
  }""",
    "state change": r"""{
    "events": [{
      "event_id": "evt_003",
      "project_id": "proj_demo",
      "session.id": "sess_abc123",
      "event.type": "state.change",
      "event.timestamp": "2024-01-15T10:30:16Z",
      "page.path": "/products",
      "ui.state.key": "cart.items",
      "ui.state.before": "[]",
      "ui.state.after": "[{\"id\":\"prod_123\",\"qty\":1}]"
    }]
  }""",
    "journey step": r"""{
    "events": [{
      "event_id": "evt_004",
      "project_id": "proj_demo",
      "session.id": "sess_abc123",
      "event.type": "journey.step",
      "event.timestamp": "2024-01-15T10:31:00Z",
      "page.path": "/checkout",
      "gen_ai.journey.id": "checkout_flow",
      "gen_ai.journey.step.id": "step_payment",
      "gen_ai.journey.step.name": "Enter Payment Details"
    }]
  }""",
    "batch": r"""{
    "events": [
      {
        "event_id": "evt_005",
        "project_id": "proj_demo",
        "session.id": "sess_abc123",
        "event.type": "page.view",
        "event.timestamp": "2024-01-15T10:30:00Z",
        "page.path": "/checkout"
      },
      {
        "event_id": "evt_006",
        "project_id": "proj_demo",
        "session.id": "sess_abc123",
        "event.type": "ui.input",
        "event.timestamp": "2024-01-15T10:30:30Z",
        "page.path": "/checkout",
        "ui.component.name": "EmailInput",
        "ui.action": "input"
      },
      {
        "event_id": "evt_007",
        "project_id": "proj_demo",
        "session.id": "sess_abc123",
        "event.type": "ui.submit",
        "event.timestamp": "2024-01-15T10:31:00Z",
        "page.path": "/checkout",
        "ui.component.name": "CheckoutForm",
        "ui.action": "submit"
      }
    ]
  }""",
}

TEXT_FIELDS = [
    *("user.id", "event.name", "page.path", "page.title", "page.url", "page.referrer"),
    *("ui.component.name", "ui.component.path", "ui.component.type", "ui.action", "ui.element"),
    *("ui.element.text", "ui.state.key", "ui.state.before", "ui.state.after"),
    *("gen_ai.journey.id", "gen_ai.journey.step.id", "gen_ai.journey.step.name"),
    *("api.method", "api.path", "error.type", "error.message", "error.stack"),
]
INTEGER_FIELDS = ["event.sequence", "api.status_code", "api.duration_ms", "duration_ms"]
METADATA = {"plan": "pro", "seats": 3, "beta": True, "tags": ["a", None], "nested": {"x": 0.5}}

EVENT_TYPES = [
    *("page.view", "page.leave", "ui.click", "ui.input", "ui.scroll", "ui.focus", "ui.blur"),
    *("ui.submit", "state.change", "api.request", "api.response", "journey.step", "error"),
    *("performance", "custom"),
]


def check_refusal(answer: Answer, status: int) -> str:
    """Fails unless it is a refusal in the form that all have; returns its text."""
    assert answer.status == status, answer.body
    assert list(answer.json) == ["error"]
    text: str = answer.json["error"]
    assert text
    return text


def check_cors(answer: Answer) -> None:
    """Fails unless the answer lets the page at ORIGIN read it."""
    assert answer.headers.get_all("Access-Control-Allow-Origin") == [ORIGIN]
    assert answer.headers["Access-Control-Allow-Credentials"] == "true"
    assert "Origin" in answer.headers["Vary"]


def test_documented_examples_are_accepted_and_deduplicated(
    service: Service, database: Connection
) -> None:
    """Every documented example is accepted, and accepted again without another row."""
    key = service.run("keys", "create", "--project", "proj_demo").stdout.strip()
    demo = Tenant(service, Project("proj_demo", key), database)
    for _ in range(2):
        for example in EXAMPLES.values():
            answer = demo.post(example.encode())
            expected = accepted(len(json.loads(example)["events"]))
            assert (answer.status, answer.json) == (202, expected)
        rows = {row["event_id"]: row for row in demo.read_rows()}
        assert sorted(rows) == [f"evt_00{number}" for number in range(1, 8)]
    assert rows["evt_003"]["ui_state_after"] == '[{"id":"prod_123","qty":1}]'
    demo.take_rows()


def test_documented_optional_fields_reach_their_columns(tenant: Tenant) -> None:
    """Every documented optional field is stored in the column of its name."""
    sent: dict[str, object] = {name: f"a {name}" for name in TEXT_FIELDS}
    sent |= {name: 200 + place for place, name in enumerate(INTEGER_FIELDS)}
    sent["metadata"] = METADATA
    tenant.post_events([tenant.make_event(sent)])
    [row] = tenant.read_rows()
    assert {name: row[name.replace(".", "_")] for name in sent} == sent
    assert row["attributes"] is None


def test_an_event_needs_only_the_required_fields(tenant: Tenant) -> None:
    """An event with nothing but the required fields is stored, and everything else is null."""
    tenant.post_events([tenant.make_event()])
    [row] = tenant.read_rows()
    stored = {name.replace(".", "_"): value for name, value in tenant.make_event().items()}
    stored["event_timestamp"] = "2024-01-15T10:30:00+00:00"
    assert {name: value for name, value in row.items() if value is not None} == stored


def test_every_documented_event_type_is_stored(tenant: Tenant) -> None:
    """Every documented event type is accepted and stored."""
    events = [tenant.make_event({"event_id": name, "event.type": name}) for name in EVENT_TYPES]
    assert tenant.post_events(events) == accepted(15)
    assert [row["event_type"] for row in tenant.read_rows()] == sorted(EVENT_TYPES)


def test_a_bad_event_leaves_its_neighbour_stored(tenant: Tenant) -> None:
    """A bad event is rejected by its index, and its neighbour is stored."""
    outcome = tenant.post_events([tenant.make_event(), tenant.make_event({"event_id": None})])
    errors = [{"index": 1, "error": "event_id: required"}]
    assert outcome == {"accepted": 1, "rejected": 1, "errors": errors}
    assert len(tenant.read_rows()) == 1


def test_a_batch_of_bad_events_is_answered_202(tenant: Tenant) -> None:
    """A batch without a good event is still answered 202, each error at its own index."""
    outcome = tenant.post_events([{}, 5, tenant.make_event({"event.type": ""})])
    errors = ["event_id: required", "event: must be an object", "event.type: required"]
    assert (outcome["accepted"], outcome["rejected"]) == (0, 3)
    assert outcome["errors"] == [{"index": i, "error": error} for i, error in enumerate(errors)]


@pytest.mark.parametrize("events", [[], [5]], ids=["no event", "no good event"])
def test_a_batch_with_nothing_to_store_is_accepted(tenant: Tenant, events: list[object]) -> None:
    """A batch that leaves nothing to store is no mistake."""
    outcome = tenant.post_events(events)
    assert (outcome["accepted"], outcome["rejected"]) == (0, len(events))


def test_a_repeated_event_keeps_its_first_content(tenant: Tenant) -> None:
    """An event counts as sent again by id and stored timestamp, and its first content stays."""
    first = tenant.make_event({"page.path": "/first"})
    again = first | {"event.timestamp": "2024-01-15T11:30:00.0000009+01:00", "page.path": "/again"}
    later = first | {"event.timestamp": "2024-01-15T10:30:00.000001Z", "page.path": "/later"}
    assert tenant.post_events([first, again, later]) == accepted(3)
    assert tenant.post_events([again, later]) == accepted(2)
    assert [row["page_path"] for row in tenant.read_rows()] == ["/first", "/later"]


def test_two_projects_may_share_an_event_id(tenant: Tenant) -> None:
    """Two projects may use the same event_id at the same moment."""
    other = Tenant(tenant.service, create_project(tenant.service), tenant.database)
    for each in (tenant, other):
        each.post_events([each.make_event()])
        assert len(each.read_rows()) == 1


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"\x00", b"null", b'"events"', b"[]", b"{}", b'{"Events": []}', b"\x1f\x8b"),
        *(b'{"events": [', b'{"events": []} x', b"{'events': []}", b'{"events": [], }'),
        *(b'{"events": null}', b'{"events": {}}', b'{"events": "x"}', b'{"events": [{"x": 01}]}'),
        *(b'{"events": [{"x": NaN}]}', b'{"events": [{"x": NaN, "y": "\\ud83d"}]}'),
        *(b'{"events": [{"x": -Infinity}]}', b'{"events": [{"x": "\n"}]}'),
        *(b'{"events": [{"x": \xff}]}', b'{"events": [], "x": "\xed\xa0\xbd"}'),
        b'{"events": [{"x": "\\ud83d \n"}]}',
    ],
    ids=repr,
)
def test_a_body_without_events_is_answered_400(tenant: Tenant, body: bytes) -> None:
    """A body that is not JSON, or has no array of events, is answered 400."""
    check_refusal(tenant.post(body), 400)


@pytest.mark.parametrize("path", ["/v1/event", "/v1/events/1", "/v2/events", "/", "/metrics"])
def test_an_unknown_path_is_answered_404(service: Service, path: str) -> None:
    """Another path is answered 404."""
    check_refusal(send(service, "POST", path, b"{}"), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *((method, "/v1/events", "POST") for method in ("GET", "PUT", "PATCH", "DELETE", "BREW")),
        *(("POST", path, "GET") for path in ("/health", "/ready")),
    ],
)
def test_a_wrong_method_is_answered_405(
    service: Service, method: str, path: str, allowed: str
) -> None:
    """A method that a path does not have is answered 405, with those that it has."""
    answer = send(service, method, path, b"")
    check_refusal(answer, 405)
    assert allowed in answer.headers["Allow"].split(", ")


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "text/json", "application/jsonp"])
def test_a_body_not_declared_json_is_answered_415(tenant: Tenant, content_type: str | None) -> None:
    """What is not declared as JSON is answered 415."""
    check_refusal(tenant.post({"events": []}, content_type=content_type), 415)


@pytest.mark.parametrize("parameters", ["", "; charset=utf-8", ";x=y; z=1"])
def test_json_is_declared_in_any_case_with_parameters(tenant: Tenant, parameters: str) -> None:
    """JSON is declared in any case and with any parameters."""
    answer = tenant.post({"events": []}, content_type=f"Application/JSON{parameters}")
    assert answer.status == 202


@pytest.mark.parametrize("accept", ["text/html", "application/xml", "image/png;q=0.1", "x"])
def test_answers_are_json_whatever_the_client_accepts(tenant: Tenant, accept: str) -> None:
    """Answers are JSON, whatever the client would rather have."""
    check_refusal(tenant.post(b"{", accept=accept), 400)
    check_refusal(send(tenant.service, "GET", "/x", accept=accept), 404)
    assert tenant.post({"events": []}, accept=accept).json == accepted(0)


def test_every_unusable_key_gets_the_same_401(tenant: Tenant) -> None:
    """A missing, malformed, unknown or revoked key is always answered the same, byte by byte."""
    revoked = create_revoked_key(tenant.service, tenant.project.id)
    good = tenant.project.key
    swapped = good[:-8] + good[:-9:-1]
    keys = [None, "", "x", "pgk_", good + "x", good[:-1], good.upper(), swapped, revoked, "é"]
    body: dict[str, list[object]] = {"events": []}
    answers = [tenant.post(body, x_pg_api_key=key, x_request_id="same") for key in keys]
    seen = [(a.body, [pair for pair in a.headers.items() if pair[0] != "Date"]) for a in answers]
    assert seen == seen[:1] * len(keys)
    check_refusal(answers[0], 401)


def test_several_keys_of_a_project_work_together(tenant: Tenant) -> None:
    """Several keys of a project work at once, the newest from its first moment."""
    made = tenant.service.run("keys", "create", "--project", tenant.project.id)
    for key in (made.stdout.strip(), tenant.project.key):
        answer = tenant.post({"events": [tenant.make_event()]}, x_pg_api_key=key)
        assert answer.json == accepted(1)


def test_a_faulty_request_is_answered_by_its_first_fault(tenant: Tenant) -> None:
    """A request with many faults is answered by the first: key, type, size, JSON, shape, count."""
    too_large = b"{" * (10 * MEGABYTE + 1)
    check_refusal(tenant.post(too_large, content_type="text/plain", x_pg_api_key="x"), 401)
    check_refusal(tenant.post(too_large, content_type="text/plain"), 415)
    bodies = [too_large, b'{"events": {', {"events": {"x": [None] * 1001}}, {"events": [0] * 1001}]
    assert len({check_refusal(tenant.post(body), 400) for body in bodies}) == 4


def test_http_takes_batches_of_up_to_1000_events(tenant: Tenant) -> None:
    """A thousand events are taken at once, and of a thousand and one none."""
    events = tenant.make_events(1001)
    check_refusal(tenant.post({"events": events}), 400)
    assert tenant.read_rows() == []
    assert tenant.post_events(events[1:]) == accepted(1000)
    assert len(tenant.read_rows()) == 1000


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_http_takes_bodies_of_up_to_10_mb(tenant: Tenant, encoding: str) -> None:
    """A body of 10 MB is read, and not a byte more, before and after decompression."""
    body = json.dumps({"events": [tenant.make_event()]}).encode()

    def post_padded(size: int) -> Answer:
        padded = body + b" " * (size - len(body))
        compressed = gzip.compress(padded) if encoding == "gzip" else padded
        return tenant.post(compressed, content_encoding=encoding)

    assert post_padded(10 * MEGABYTE).json == accepted(1)
    check_refusal(post_padded(10 * MEGABYTE + 1), 400)


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "x"])
def test_a_compression_other_than_gzip_is_answered_415(tenant: Tenant, encoding: str) -> None:
    """A compression other than gzip is answered 415, with what may be sent."""
    answer = tenant.post({"events": []}, content_encoding=encoding)
    check_refusal(answer, 415)
    assert answer.headers["Accept-Encoding"] == "gzip"


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity, gzip", "gzip,identity"])
def test_gzip_is_known_by_all_of_its_names(tenant: Tenant, encoding: str) -> None:
    """The old name of gzip is taken, and identity in a list means nothing."""
    body = gzip.compress(json.dumps({"events": [tenant.make_event()]}).encode())
    assert tenant.post(body, content_encoding=encoding).json == accepted(1)


@pytest.mark.parametrize("encoding", ["", "identity", "Identity, identity", ","])
def test_identity_is_no_compression(tenant: Tenant, encoding: str) -> None:
    """A body that names no coding but identity is read as it is."""
    assert tenant.post({"events": []}, content_encoding=encoding).json == accepted(0)


def test_a_few_gzip_members_are_one_body(tenant: Tenant) -> None:
    """A body may be compressed in up to 16 parts, and in no more."""
    body = json.dumps({"events": [tenant.make_event()]}).encode()
    parts = [gzip.compress(body[:9]), *[gzip.compress(b"")] * 14, gzip.compress(body[9:])]
    assert tenant.post(b"".join(parts), content_encoding="gzip").json == accepted(1)
    check_refusal(tenant.post(b"".join([*parts, parts[1]]), content_encoding="gzip"), 400)
    bomb = gzip.compress(b" " * 6 * MEGABYTE) * 2
    refused = check_refusal(tenant.post(bomb, content_encoding="gzip"), 400)
    assert refused == f"body: larger than {10 * MEGABYTE} bytes"
    junk = gzip.compress(body) + b"junk"
    assert check_refusal(tenant.post(junk, content_encoding="gzip"), 400) == "body: invalid gzip"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{\n "events": [{"x": NaN}]\n}', "line 2, column 19: NaN is not a JSON value"),
        (b'{"events": [], "x\xff": 1}', "line 1, column 18: byte 0xff is not UTF-8"),
    ],
    ids=repr,
)
def test_invalid_json_is_answered_with_its_place(tenant: Tenant, body: bytes, error: str) -> None:
    """The answer to a body that is not JSON says where, and what is there."""
    text = check_refusal(tenant.post(body), 400)
    assert text == f"body: invalid JSON at {error}"


def test_a_body_with_a_byte_order_mark_is_read(tenant: Tenant) -> None:
    """The mark that some programs write before UTF-8 is skipped."""
    body = json.dumps({"events": [tenant.make_event()]}).encode("utf-8-sig")
    assert tenant.post(body).json == accepted(1)


def test_an_event_that_is_not_utf8_is_rejected_alone(tenant: Tenant) -> None:
    """Bytes that are not UTF-8 reject their event, as over gRPC; its neighbours are stored."""
    events = json.dumps({"events": tenant.make_events(3)}).encode()
    answer = tenant.post(events.replace(b"evt_1", b"evt_\xff"))
    errors = [{"index": 1, "error": "event_id: must be valid UTF-8"}]
    assert answer.json == {"accepted": 2, "rejected": 1, "errors": errors}
    assert [row["event_id"] for row in tenant.read_rows()] == ["evt_0", "evt_2"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"events": []}',
        gzip.compress(b'{"events": []}')[:-4],
        gzip.compress(b'{"events": []}')[:-8] + bytes(8),
        gzip.compress(bytes(100 * MEGABYTE), 1),
    ],
    ids=["empty", "not compressed", "cut", "damaged", "bomb"],
)
def test_a_body_that_cannot_be_decompressed_is_answered_400(tenant: Tenant, body: bytes) -> None:
    """What cannot be decompressed to 10 MB of JSON is answered 400."""
    check_refusal(tenant.post(body, content_encoding="gzip"), 400)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/ready", 200),
        ("POST", "/v1/events", 401),
        ("GET", "/x", 404),
        ("PUT", "/v1/events", 405),
    ],
)
def test_every_answer_can_be_read_across_origins(
    service: Service, method: str, path: str, status: int
) -> None:
    """Every answer, errors included, can be read by a page that sends credentials."""
    answer = send(service, method, path, origin=ORIGIN)
    assert answer.status == status
    check_cors(answer)


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b'{"events": []}', "application/json", 202),
        (b"{", "application/json", 400),
        (b"{", "text/plain", 415),
    ],
)
def test_outcomes_of_events_can_be_read_across_origins(
    tenant: Tenant, body: bytes, content_type: str, status: int
) -> None:
    """Whatever becomes of events, the page that sent them can read it."""
    answer = tenant.post(body, origin=ORIGIN, content_type=content_type)
    assert answer.status == status
    check_cors(answer)


# Every header that is read, as a browser asks for those of a page.
READ_HEADERS = "content-encoding,content-type,prefer,traceparent,x-pg-api-key,x-request-id"


@pytest.mark.parametrize("wanted", [READ_HEADERS, "X-PG-API-Key, X-Custom"])
def test_a_preflight_needs_no_key_and_lasts_a_day(service: Service, wanted: str) -> None:
    """A preflight needs no key, allows what it asks for, and holds for a day."""
    asked = {"origin": ORIGIN, "access_control_request_method": "POST"}
    asked["access_control_request_headers"] = wanted
    answer = send(service, "OPTIONS", "/v1/events", None, **asked)
    assert (answer.status, answer.body) == (204, b"")
    check_cors(answer)
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert answer.headers["Access-Control-Allow-Headers"] == wanted
    assert answer.headers["Access-Control-Max-Age"] == "86400"


@pytest.mark.parametrize(
    ("path", "body"), [("/health", b'{"status":"ok"}'), ("/ready", b'{"status":"ready"}')]
)
def test_health_over_http_needs_no_key(service: Service, path: str, body: bytes) -> None:
    """Health and readiness answer with the documented bytes, without a key."""
    answer = send(service, "GET", path)
    assert (answer.status, answer.body) == (200, body)
    assert answer.headers["Content-Type"] == "application/json"


def test_a_server_fault_is_answered_500_without_details(tenant: Tenant) -> None:
    """A fault of the server's is answered 500 without details, and the next request is stored."""
    with tenant.failing_storage() as word:
        answer = tenant.post({"events": [tenant.make_event()]})
    assert word not in check_refusal(answer, 500)
    assert tenant.post_events([tenant.make_event()]) == accepted(1)
