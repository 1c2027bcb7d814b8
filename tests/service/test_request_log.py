"""The log of requests: a line for each, under its id, and nothing of what it carried."""

import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any, cast

import grpc
import psycopg2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from server.caller import Caller
from server.ingest.request_record import RequestRecord, RequestRecorder
from server.telemetry.request_log import RequestLog
from tests.support.clients import Tenant, bind_ingest, encode_request, open_tenant, send
from tests.support.clock import Clock
from tests.support.events import to_message
from tests.support.services import Service, ask, running_service, wait_until

TIMEOUT_SECONDS = 10.0
ID = "X-Request-ID"

Line = dict[str, Any]


@pytest.fixture(scope="module")
def logged(create_migrated: Callable[[], str]) -> Iterator[Service]:
    """Provide a service that logs all it can, and waits four seconds for a commit."""
    settings = {"LOG_LEVEL": "DEBUG", "REQUEST_TIMEOUT_SECONDS": "4"}
    with running_service(settings | {"DATABASE_URL": create_migrated()}) as service:
        yield service


@pytest.fixture
def tenant(logged: Service) -> Iterator[Tenant]:
    """Provide a project of that service."""
    with open_tenant(logged) as tenant:
        yield tenant


@pytest.fixture
def request_id() -> str:
    """Return an id that no other request has."""
    return f"test.{uuid.uuid4()}"


def read_lines(service: Service, request_id: str) -> list[Line]:
    """Return the lines about requests with this id, as soon as there is one."""

    def find() -> list[Line]:
        text = service.log.read_text()
        records = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        return [record for record in records if record.get("request_id") == request_id]

    wait_until(lambda: any(line["logger"] == "productgraph.request" for line in find()))
    return [line for line in find() if line["logger"] == "productgraph.request"]


def read_line(service: Service, request_id: str) -> Line:
    """Return the line about the request with this id, which is the only one."""
    [line] = read_lines(service, request_id)
    return line


def call(
    tenant: Tenant, request: bytes, metadata: Mapping[str, str]
) -> tuple[str, IngestEventsResponse | None, dict[str, str]]:
    """Return the code of a gRPC request, what was answered, and the trailers."""
    with grpc.insecure_channel(tenant.service.grpc_target) as channel:
        ingest = bind_ingest(channel)
        try:
            response, ended = ingest.with_call(
                request, metadata=tuple(metadata.items()), timeout=TIMEOUT_SECONDS
            )
        except grpc.RpcError as error:
            response, ended = None, cast(grpc.Call, error)
        trailers = {name: str(value) for name, value in ended.trailing_metadata() or ()}
        return ended.code().name, response, trailers


@contextmanager
def locked(tenant: Tenant) -> Iterator[None]:
    """Nothing can be stored while the context lasts; after it, the service does so again."""
    with closing(psycopg2.connect(tenant.service.database_url)) as connection:
        connection.cursor().execute("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
        yield
    wait_until(lambda: tenant.post({"events": [tenant.make_event()]}).status == 202)


def test_an_http_request_is_one_log_line(tenant: Tenant, request_id: str) -> None:
    """An HTTP request is one line, with its id, its project and what became of it."""
    body = json.dumps({"events": [tenant.make_event(), {}]}).encode()
    assert tenant.post(body, x_request_id=request_id).headers[ID] == request_id
    line = read_line(tenant.service, request_id)
    assert line["level"] == "INFO"
    assert 0 < line["duration_ms"] < 1000 * TIMEOUT_SECONDS
    assert {name: line.get(name) for name in ("protocol", "status", "project", "bytes")} == {
        "protocol": "http",
        "status": 202,
        "project": tenant.project.id,
        "bytes": len(body),
    }
    assert (line["accepted"], line["rejected"]) == (1, 1)
    assert line["key"] == read_key_number(tenant)
    assert "reason" not in line


def read_key_number(tenant: Tenant) -> int:
    """Return the number of the tenant's one key, as `keys list` shows it."""
    with tenant.database.cursor() as cursor:
        cursor.execute("SELECT id FROM api_keys WHERE project_id = %s", [tenant.project.id])
        [(number,)] = cursor.fetchall()
    return int(number)


def test_a_request_over_its_limit_logs_key_and_reason(tenant: Tenant, request_id: str) -> None:
    """A refusal for a rate limit has the number of its key and which limit it was, over both."""
    number = str(read_key_number(tenant))
    assert tenant.service.run("keys", "limit", number, "--rate", "1").returncode == 0
    body = {"events": tenant.make_events(100)}
    wait_until(lambda: tenant.post(body).status == 429)
    assert tenant.post(body, x_request_id=request_id).status == 429
    metadata = {"x-pg-api-key": tenant.project.key, "x-request-id": f"{request_id}.grpc"}
    call(tenant, encode_request([to_message(tenant.make_event())]), metadata)
    for line in (
        read_line(tenant.service, request_id),
        read_line(tenant.service, f"{request_id}.grpc"),
    ):
        assert line["status"] in (429, "RESOURCE_EXHAUSTED")
        assert line["key"] == int(number)
        assert "rate limit" in line["reason"]


def test_a_request_that_cannot_be_stored_logs_its_reason(tenant: Tenant, request_id: str) -> None:
    """A refusal because storage is locked says so, with the key, over both protocols."""
    metadata = {"x-pg-api-key": tenant.project.key, "x-request-id": f"{request_id}.grpc"}
    with locked(tenant):
        assert tenant.post({"events": [tenant.make_event()]}, x_request_id=request_id).status == 503
        call(tenant, encode_request([to_message(tenant.make_event())]), metadata)
    for line in (
        read_line(tenant.service, request_id),
        read_line(tenant.service, f"{request_id}.grpc"),
    ):
        assert line["key"] == read_key_number(tenant)
        assert line["reason"] in ("not stored in time", "storage is unavailable")


def test_a_grpc_request_is_one_log_line(tenant: Tenant, request_id: str) -> None:
    """A gRPC request is the same line, with the names that gRPC has."""
    request = encode_request([to_message(tenant.make_event()), b"\xff"])
    metadata = {"x-pg-api-key": tenant.project.key, "x-request-id": request_id}
    code, _, trailers = call(tenant, request, metadata)
    assert (code, trailers["x-request-id"]) == ("OK", request_id)
    line = read_line(tenant.service, request_id)
    names = ("level", "protocol", "status", "project", "bytes", "accepted", "rejected")
    assert [line[name] for name in names] == [
        "INFO",
        "grpc",
        "OK",
        tenant.project.id,
        len(request),
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (400, b"{", {}),
        (400, b'{"events": 1}', {}),
        (401, b"{}", {"x_pg_api_key": None}),
        (401, b"{}", {"x_pg_api_key": "pg_unknown"}),
        (401, b"{}", {"x_pg_api_key": "pg_" + 40 * "a"}),
        (415, b"{}", {"content_type": "text/plain"}),
    ],
)
def test_a_refused_http_request_is_no_warning(
    status: int, body: bytes, headers: dict[str, str | None], tenant: Tenant, request_id: str
) -> None:
    """What is refused over HTTP has its id too, and is no warning: it is its client's fault."""
    answer = tenant.post(body, x_request_id=request_id, **headers)
    assert (answer.status, answer.headers[ID]) == (status, request_id)
    line = read_line(tenant.service, request_id)
    assert (line["level"], line["status"], "accepted" in line) == ("INFO", status, False)


@pytest.mark.parametrize(("code", "key"), [("UNAUTHENTICATED", "x"), ("INVALID_ARGUMENT", None)])
def test_a_refused_grpc_request_is_no_warning(
    code: str, key: str | None, tenant: Tenant, request_id: str
) -> None:
    """What is refused over gRPC has its id too, and is no warning."""
    metadata = {"x-pg-api-key": key or tenant.project.key, "x-request-id": request_id}
    answered, _, trailers = call(tenant, b"\xff", metadata)
    assert (answered, trailers["x-request-id"]) == (code, request_id)
    line = read_line(tenant.service, request_id)
    assert (line["level"], line["status"]) == ("INFO", code)


def test_a_request_without_usable_id_gets_its_own(tenant: Tenant) -> None:
    """A request without an id that can be used gets one that no other has."""
    sent = [None, "", "a b", "a" * 129, "a,b", "\xe4", "a\tb"]
    got = [tenant.post(b"{}", x_request_id=each).headers[ID] for each in sent]
    key = {"x-pg-api-key": tenant.project.key}
    got += [
        call(tenant, b"", key | {"x-request-id": each})[2]["x-request-id"] for each in ("", "?")
    ]
    assert len(set(got) - set(sent)) == len(sent) + 2
    assert {read_line(tenant.service, each)["request_id"] for each in got} == set(got)


def test_a_page_may_read_the_request_id(tenant: Tenant) -> None:
    """A page may read the id."""
    answer = tenant.post(b"{}", origin="https://example.com")
    assert ID in answer.headers["Access-Control-Expose-Headers"].split(", ")


def test_a_failed_request_is_one_warning_with_its_id(tenant: Tenant, request_id: str) -> None:
    """A request that fails by a fault of the service is one warning, under the fault's own id."""
    with tenant.failing_storage():
        answer = tenant.post({"events": [tenant.make_event()]}, x_request_id=request_id)
    assert (answer.status, answer.headers[ID]) == (500, request_id)
    line = read_line(tenant.service, request_id)
    assert (line["level"], line["status"], line["accepted"]) == ("WARNING", 500, 1)


def test_a_request_not_stored_in_time_is_a_warning(tenant: Tenant, request_id: str) -> None:
    """A request that is not stored in time is one warning."""
    metadata = {"x-pg-api-key": tenant.project.key, "x-request-id": f"{request_id}.grpc"}
    event = tenant.make_event()
    tenant.post_events([event])
    with locked(tenant):
        answer = tenant.post({"events": [event]}, x_request_id=request_id)
        code, _, trailers = call(tenant, encode_request([to_message(event)]), metadata)
    assert (answer.status, answer.headers[ID]) == (503, request_id)
    assert (code, trailers["x-request-id"]) == ("UNAVAILABLE", f"{request_id}.grpc")
    for name, status in ((request_id, 503), (f"{request_id}.grpc", "UNAVAILABLE")):
        line = read_line(tenant.service, name)
        assert (line["level"], line["status"]) == ("WARNING", status)


def send_and_leave(tenant: Tenant, request_id: str, key: str) -> None:
    """Send an event over HTTP, and close the connection before the answer."""
    body = json.dumps({"events": [tenant.make_event()]})
    headers = {"Content-Type": "application/json", "X-PG-API-Key": key, ID: request_id}
    with closing(HTTPConnection("127.0.0.1", tenant.service.http_port, TIMEOUT_SECONDS)) as http:
        http.request("POST", "/v1/events", body, headers)


def test_a_client_gone_before_commit_is_logged_once(tenant: Tenant, request_id: str) -> None:
    """A request whose client does not wait for the answer is one line, with what was stored."""
    tenant.post_events([])
    with locked(tenant):
        send_and_leave(tenant, request_id, tenant.project.key)
        assert (
            ask(f"{tenant.service.http_url}/health") == 200
        )  # after the request, in the same loop
    assert read_line(tenant.service, request_id)["status"] == 202


def test_a_failure_after_the_client_left_is_logged(tenant: Tenant, request_id: str) -> None:
    """Where nothing was stored for a client that is gone, the line does not say it was."""
    tenant.post_events([])
    with locked(tenant):
        send_and_leave(tenant, request_id, tenant.project.key)
        assert read_line(tenant.service, request_id)["status"] == 503


def test_a_cancelled_grpc_call_is_one_log_line(tenant: Tenant, request_id: str) -> None:
    """A gRPC call that its client gives up is one line."""
    tenant.post_events([])
    metadata = (("x-pg-api-key", tenant.project.key), ("x-request-id", request_id))
    with locked(tenant), grpc.insecure_channel(tenant.service.grpc_target) as channel:
        ingest = bind_ingest(channel)
        request = encode_request([to_message(tenant.make_event())])
        calling: Any = ingest.future(request, metadata=metadata, timeout=TIMEOUT_SECONDS)
        wait_until(tenant.service.is_waiting_for_lock)
        calling.cancel()
        assert read_line(tenant.service, request_id)["status"] in ("CANCELLED", "UNAVAILABLE")


SECRET = "c0nfidential"


def test_the_request_log_shows_no_keys_or_events(tenant: Tenant) -> None:
    """Neither keys nor anything of an event is in the log, whatever becomes of the request."""
    good = tenant.make_event(
        {
            "session.id": f"s-{SECRET}",
            "page.title": SECRET,
            "metadata": {SECRET: SECRET},
        }
    )
    bad = [
        good | {"event.type": SECRET},
        good | {"event_id": ""},
        good | {"event.timestamp": SECRET},
        good | {"project_id": SECRET},
        good | {SECRET: SECRET, "duration_ms": SECRET},
        SECRET,
    ]
    key = f"pg_{SECRET}"
    bodies: list[object] = [{"events": [good, *bad]}, {SECRET: 1}, f'{{"{SECRET}'.encode(), [good]]
    before = len(tenant.service.log.read_text())
    requests = [encode_request([to_message(good), SECRET.encode()]), SECRET.encode()]

    def send_all(*, last: str) -> None:
        for body in bodies:
            tenant.post(body)
            tenant.post(body, x_pg_api_key=key)
            tenant.post(body, content_encoding="gzip")
            tenant.post(body, content_type=SECRET)
        for request in requests:
            call(tenant, request, {"x-pg-api-key": tenant.project.key})
            call(tenant, request, {"x-pg-api-key": key})
        send(tenant.service, "POST", f"/{SECRET}", b"{}", x_pg_api_key=tenant.project.key)
        tenant.post(b"{}", x_request_id=last)
        read_line(tenant.service, last)

    send_all(last=f"{tenant.project.id}.stored")
    with tenant.failing_storage():
        send_all(last=f"{tenant.project.id}.refused")
    whole = tenant.service.log.read_text()
    assert "CheckViolation" in whole  # once in a while, so maybe before this test
    log = whole[before:]
    assert SECRET not in log
    assert tenant.project.key not in log


@contextmanager
def complaining_storage(tenant: Tenant, sqlstate: str, message: str) -> Iterator[None]:
    """PostgreSQL raises an error for each of this tenant's rows while the context lasts."""
    name = f"complain_{tenant.project.id}"
    with tenant.database.cursor() as cursor:
        cursor.execute(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" RAISE EXCEPTION '%', {message} USING ERRCODE = '{sqlstate}'; END $$;"
            f"CREATE TRIGGER {name} BEFORE INSERT ON events FOR EACH ROW"
            f" WHEN (NEW.project_id = '{tenant.project.id}') EXECUTE FUNCTION {name}()"
        )
        try:
            yield
        finally:
            cursor.execute(f"DROP FUNCTION {name} CASCADE")


@pytest.mark.parametrize(
    ("sqlstate", "message", "said"),
    [
        ("53100", "'no space left'", "no space left"),  # an outage, in the middle of COPY
        ("XX000", "'a page is broken'", "a page is broken"),  # what nobody expects
        ("22P02", "NEW.page_title", "InvalidTextRepresentation"),  # the data itself
    ],
)
def test_database_errors_are_logged_without_the_row(
    sqlstate: str, message: str, said: str, tenant: Tenant
) -> None:
    """What PostgreSQL says of the row that it was busy with is not in the log, but what failed."""
    event = tenant.make_event({"page.title": SECRET})
    with complaining_storage(tenant, sqlstate, message):
        assert tenant.post({"events": [event]}).status >= 500
    wait_until(lambda: said in tenant.service.log.read_text())
    assert SECRET not in tenant.service.log.read_text()


def finish_request(recorder: RequestRecorder, status: int | str) -> RequestRecord:
    """Return a request that ends at once."""
    record = recorder.begin("http", "/v1/events")
    record.finish(status)
    return record


def test_sampled_out_log_lines_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A level gets its lines of each second; what it leaves out is counted in its next line."""
    clock = Clock(0.0)
    recorder = RequestRecorder((RequestLog(3),), clock)
    with caplog.at_level(logging.INFO):
        for status in (202, 503, 202, "OK", 401, "UNAVAILABLE", 202):
            finish_request(recorder, status)
        clock.now = 0.99
        finish_request(recorder, 202)
        clock.now = 1.0
        finish_request(recorder, 202)
        finish_request(recorder, 202)
        finish_request(recorder, 500)
    fields = [
        (line.levelname, vars(line)["status"], vars(line).get("omitted")) for line in caplog.records
    ]
    assert fields == [
        ("INFO", 202, None),
        ("WARNING", 503, None),
        ("INFO", 202, None),
        ("INFO", "OK", None),
        ("WARNING", "UNAVAILABLE", None),
        ("INFO", 202, 3),
        ("INFO", 202, None),
        ("WARNING", 500, None),
    ]


def test_requests_are_not_counted_below_the_log_level(caplog: pytest.LogCaptureFixture) -> None:
    """Where INFO is off, requests that went well are neither written nor counted."""
    recorder = RequestRecorder((RequestLog(1),), Clock(0.0))
    with caplog.at_level(logging.WARNING):
        for status in (202, "OK", 400, "INTERNAL"):
            finish_request(recorder, status)
    [line] = caplog.records
    assert vars(line)["status"] == "INTERNAL"
    assert "omitted" not in vars(line)


def test_a_broken_sink_leaves_the_others_working(caplog: pytest.LogCaptureFixture) -> None:
    """A sink that fails is logged, and takes nothing from the others."""

    class Broken:
        def record(self, request: RequestRecord) -> None:
            raise RuntimeError(request.protocol)

    seen: list[RequestRecord] = []

    class Whole:
        def record(self, request: RequestRecord) -> None:
            seen.append(request)

    record = finish_request(RequestRecorder((Broken(), Whole())), 202)
    assert seen == [record]
    assert "a request could not be recorded" in caplog.text


@given(st.text("azAZ09._-", max_size=130) | st.text("aZ09._-/ \n\0\xe4\u0661", max_size=9))
def test_only_short_harmless_request_ids_are_taken_over(sent: str) -> None:
    """An id is taken over if it is short and of harmless characters, and else replaced."""
    got = RequestRecorder().begin("http", "/v1/events", sent).request_id
    harmless = sent.isascii() and sent.replace(".", "").replace("_", "").replace("-", "")
    is_usable = 0 < len(sent) <= 128 and (harmless == "" or (harmless and harmless.isalnum()))
    assert (got == sent) == is_usable
    assert 0 < len(got) <= 128


def test_logged_durations_cover_only_what_happened() -> None:
    """The parts of a request follow each other; of what it did not come to, there is none."""
    clock = Clock(0.0)
    whole, refused = (
        RequestRecorder((), clock).begin("grpc", "a/B"),
        RequestRecorder((), clock).begin("http", "/v1/events"),
    )
    clock.now = 1.0
    whole.authenticated(Caller("p"))
    clock.now = 3.0
    whole.decoded(IngestEventsResponse())
    clock.now = 7.0
    whole.finish("OK")
    refused.finish(401)
    parts = (whole.seconds_authenticating, whole.seconds_decoding, whole.seconds_storing)
    assert (*parts, whole.seconds) == (1.0, 2.0, 4.0, 7.0)
    assert (refused.seconds_authenticating, refused.seconds_decoding, refused.seconds_storing) == (
        None,
        None,
        None,
    )
