"""What an API key may send a second, over both protocols and on all workers together."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any, cast

import grpc
import http_sf
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from server.rates import format_byte_rate, format_event_rate, parse_byte_rate, parse_event_rate
from server.storage.connection import connected, open_engine
from server.storage.keys import create_key
from tests.support.clients import Refusal, Tenant, accepted, bind_ingest, encode_request
from tests.support.clients import send as send_http
from tests.support.events import make_event, to_message
from tests.support.load import STORED, Client, GrpcClient, HttpClient, send
from tests.support.projects import Project, create_project
from tests.support.services import Service, running_service, wait_until


def limited(tenant: Tenant, event_rate: int | None = None, byte_rate: int | None = None) -> Tenant:
    """Return the same project with a key that has these rates."""
    with connected(open_engine(tenant.service.database_url)) as connection:
        key = create_key(connection, tenant.project.id, "limited", event_rate, byte_rate)
    return Tenant(tenant.service, Project(tenant.project.id, key), tenant.database)


def read_quotas(tenant: Tenant, count: int = 0) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Return the status of a request of `count` events, its RateLimit and RateLimit-Policy."""
    answer = tenant.post({"events": tenant.make_events(count)})
    fields = (answer.headers[name] for name in ("RateLimit", "RateLimit-Policy"))
    parsed: list[Any] = [http_sf.parse(field.encode(), tltype="list") for field in fields]
    return answer.status, dict(parsed[0]), dict(parsed[1])


def test_without_limits_no_answer_speaks_of_limits(tenant: Tenant) -> None:
    """Without limits nothing is refused, and no answer speaks of limits."""
    for _ in range(5):
        answer = tenant.post({"events": tenant.make_events(1000)})
        assert answer.status == 202
        assert "RateLimit" not in answer.headers
        assert "RateLimit-Policy" not in answer.headers


def test_a_request_over_its_rate_is_answered_429(tenant: Tenant) -> None:
    """A refused request is answered 429 with when to come back, and nothing of it is kept."""
    slow = limited(tenant, event_rate=10)
    assert slow.post_events(slow.make_events(1000)) == accepted(1000)
    assert len(slow.take_rows()) == 1000
    answer = slow.post({"events": [{}, *slow.make_events(1)]}, origin="https://a.example")
    assert answer.status == 429
    assert answer.json == {"error": "rate limit exceeded: 10 events/s"}
    assert 90 < int(answer.headers["Retry-After"]) <= 100
    exposed = answer.headers["Access-Control-Expose-Headers"]
    assert set(exposed.split(", ")) >= {"Retry-After", "RateLimit", "RateLimit-Policy"}
    assert slow.read_rows() == []


def test_both_protocols_share_one_rate_limit(tenant: Tenant) -> None:
    """Over gRPC it is RESOURCE_EXHAUSTED with RetryInfo, and one limit is for both protocols."""
    slow = limited(tenant, event_rate=10)
    assert slow.post_events(slow.make_events(1000)) == accepted(1000)
    slow.take_rows()
    request = encode_request(map(to_message, slow.make_events(1)))
    target, key = slow.service.grpc_target, slow.project.key
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as failure:
        bind_ingest(channel)(request, metadata=(("x-pg-api-key", key),))
    call = cast(grpc.Call, failure.value)
    assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call.details() == "rate limit exceeded: 10 events/s"
    status = Status.FromString(dict(call.trailing_metadata())["grpc-status-details-bin"])
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    retry = RetryInfo()
    assert status.details[0].Unpack(retry)
    assert 90 < retry.retry_delay.seconds <= 100
    assert slow.read_rows() == []


def test_answers_carry_rate_limits_as_structured_fields(tenant: Tenant) -> None:
    """Answers tell the policies, and what is left, as structured fields."""
    slow = limited(tenant, event_rate=1000, byte_rate=10**9)
    status, limits, policies = read_quotas(slow, 500)
    assert status == 202
    assert policies == {
        "events": {"q": 1000, "qu": "events", "w": 1},
        "bytes": {"q": 10**9, "qu": "content-bytes", "w": 1},
    }
    assert 500 <= limits["events"]["r"] <= 1000
    assert 10**8 <= limits["bytes"]["r"] <= 10**9
    assert {limit["t"] for limit in limits.values()} <= {0, 1}


def test_a_refusal_says_when_the_quota_is_restored(tenant: Tenant) -> None:
    """When nothing is left, the fields say so, and when all will be there again."""
    slow = limited(tenant, event_rate=10)
    for status in (202, 429):
        found, limits, policies = read_quotas(slow, 1000)
        assert found == status
        assert policies == {"events": {"q": 10, "qu": "events", "w": 1}}
        assert limits["events"]["r"] == 0
        assert 90 < limits["events"]["t"] <= 100


def test_a_failed_commit_is_answered_with_the_limits(tenant: Tenant) -> None:
    """An answer to events that could not be stored tells the limits as every other answer does."""
    slow = limited(tenant, event_rate=1000)
    with slow.failing_storage():
        status, limits, policies = read_quotas(slow, 500)
    assert status == 500
    assert policies == {"events": {"q": 1000, "qu": "events", "w": 1}}
    assert 500 <= limits["events"]["r"] <= 1000


def test_rejected_and_repeated_events_count_towards_the_rate(tenant: Tenant) -> None:
    """Rejected events and repeated ones count like others."""
    slow = limited(tenant, event_rate=10)
    assert slow.post_events([{}] * 300)["rejected"] == 300
    assert slow.post({"events": slow.make_events(1)}).status == 429


@pytest.mark.parametrize("chunked", [False, True])
def test_bytes_over_http_count_before_they_are_read(chunked: bool, tenant: Tenant) -> None:
    """A body's bytes are counted before it is read: what is refused for them may be no JSON."""
    slow = limited(tenant, byte_rate=1024)
    body = json.dumps({"events": [slow.make_event({"page.path": "/" * 50_000})]}).encode()
    headers = {"content_type": "application/json", "x_pg_api_key": slow.project.key}
    sent = cast(bytes, iter([body])) if chunked else body
    assert send_http(slow.service, "POST", "/v1/events", sent, **headers).status == 202
    answer = slow.post(b"no JSON")
    assert answer.status == 429
    assert answer.json == {"error": "rate limit exceeded: 1024 bytes/s"}
    assert 40 < int(answer.headers["Retry-After"]) <= 50


def test_a_gzip_body_over_its_limit_is_not_unpacked(tenant: Tenant) -> None:
    """A key that may send nothing now is answered 429 before its body is unpacked."""
    assert tenant.post(b"no gzip", content_encoding="gzip").status == 400
    slow = limited(tenant, byte_rate=1024)
    assert slow.post_events([slow.make_event({"page.path": "/" * 90_000})]) == accepted(1)
    answer = slow.post(b"no gzip", content_encoding="gzip")
    assert (answer.status, answer.json) == (429, {"error": "rate limit exceeded: 1024 bytes/s"})
    assert int(answer.headers["Retry-After"]) > 60


def test_bytes_over_grpc_count_before_they_are_read(tenant: Tenant) -> None:
    """The same holds for the messages of gRPC."""
    slow = limited(tenant, byte_rate=1024)
    event = to_message(slow.make_event({"page.path": "/" * 50_000}))
    assert slow.ingest([event]) == accepted(1)
    with pytest.raises(Refusal) as refusal:
        slow.call(b"\xff" * 10)
    assert refusal.value == Refusal("RESOURCE_EXHAUSTED", "rate limit exceeded: 1024 bytes/s")


def test_a_compressed_body_counts_as_it_unpacks(tenant: Tenant) -> None:
    """Of a compressed body those bytes count that it unpacks to."""
    slow = limited(tenant, byte_rate=1024)
    body = json.dumps({"events": [slow.make_event({"page.path": "/" * 50_000})]}).encode()
    assert slow.post(gzip.compress(body), content_encoding="gzip").status == 202
    answer = slow.post(gzip.compress(body), content_encoding="gzip")
    assert answer.status == 429
    assert 40 < int(answer.headers["Retry-After"]) <= 50


def test_refused_requests_do_not_use_up_the_rate(tenant: Tenant) -> None:
    """However many requests are refused, the next that fits passes when its time has come."""
    slow = limited(tenant, event_rate=100)
    assert slow.post({"events": slow.make_events(150)}).status == 202
    # A machine that is busy may be so slow that the first of them is not refused.
    wait_until(lambda: slow.post({"events": slow.make_events(150)}).status == 429)
    wait_until(lambda: slow.post({"events": slow.make_events(100)}).status == 202)


def test_the_rates_of_a_key_can_be_set_singly(tenant: Tenant) -> None:
    """A key is made with rates, shows them, and gets other ones, each by itself."""
    run, name = tenant.service.run, f"key_{tenant.project.id}"
    options = ("--name", name, "--rate", "500", "--byte-rate", "5MB")
    assert run("keys", "create", "--project", tenant.project.id, *options).returncode == 0

    def find() -> list[str]:
        listed = run("keys", "list").stdout.splitlines()
        assert listed[0].split()[3:6] == ["RATE", "BYTE", "RATE"]
        return next(line.split() for line in listed if name in line)

    number, _, _, *rates = find()[:5]
    assert rates == ["500", "5MB"]
    for change, expected in (
        (["--rate", "off"], ["off", "5MB"]),
        (["--byte-rate", "default"], ["off", "-"]),
        (["--rate", "default", "--byte-rate", "1500"], ["-", "1500"]),
    ):
        done = run("keys", "limit", number, *change)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert find()[3:5] == expected
    for arguments, status in (
        (("999999999", "--rate", "5"), 1),
        ((number,), 2),
        ((number, "--rate", "x"), 2),
    ):
        done = run("keys", "limit", *arguments)
        assert (done.returncode, done.stdout) == (status, "")
    assert "must be off or events a second" in done.stderr


@pytest.mark.parametrize("rate", [0, 1, 1023, 1024, 1025, 1536, 5 * 1024**2, 3 * 1024**3, 10**9])
def test_a_rate_is_shown_as_it_is_given(rate: int) -> None:
    """A rate is shown as it can be given."""
    assert parse_event_rate(format_event_rate(rate % 10**9)) == rate % 10**9
    if 1024 <= rate <= 10**9:
        assert parse_byte_rate(format_byte_rate(rate)) == rate


RATE, BATCH = 100, 10
MEASURED_SECONDS = 5.0


@pytest.fixture(scope="module")
def two_workers(create_migrated: Any) -> Iterator[Service]:
    """Provide a service with two workers and a default limit."""
    settings = {"DATABASE_URL": create_migrated(), "WORKERS": "2", "RATE_LIMIT": str(RATE)}
    with running_service(settings) as running:
        yield running


def all_have_connections(service: Service) -> bool:
    """Whether each worker has one of a client, of either protocol."""
    ports = {service.http_port, int(service.grpc_target.rpartition(":")[2])}
    return all(
        any(c.laddr.port in ports and c.status == "ESTABLISHED" for c in worker.net_connections())
        for worker in service.find_workers()
    )


@pytest.mark.slow
def test_two_workers_share_the_rate_of_a_key(two_workers: Service) -> None:
    """Two workers accept what one may, over both protocols and both together."""
    project = create_project(two_workers)
    accepted_at: list[float] = []
    refused_at: list[float] = []
    stop = threading.Event()

    def press(client: Client) -> None:
        while not stop.is_set():
            status = send(client, [make_event(project.id) for _ in range(BATCH)])
            (accepted_at if status in STORED else refused_at).append(time.monotonic())
            assert status in STORED | {"429", "RESOURCE_EXHAUSTED"}

    with ExitStack() as stack:
        clients: list[Client] = [
            stack.enter_context(closing(kind(two_workers, project.key)))
            for kind in [HttpClient] * 4 + [GrpcClient] * 4
        ]
        for client in clients:
            assert send(client, []) in STORED
        while not all_have_connections(two_workers):
            clients.append(stack.enter_context(closing(HttpClient(two_workers, project.key))))
            assert send(clients[-1], []) in STORED
        pressing = [threading.Thread(target=press, args=[client]) for client in clients]
        for thread in pressing:
            thread.start()
        time.sleep(MEASURED_SECONDS)
        stop.set()
        for thread in pressing:
            thread.join()
    start, end = min(refused_at), max(refused_at)
    assert len(refused_at) > len(accepted_at), "the load was not well above the limit"
    rate = sum(BATCH for moment in accepted_at if start < moment <= end) / (end - start)
    assert rate == pytest.approx(RATE, rel=0.2)


def test_a_key_can_be_exempt_from_the_default_rate(two_workers: Service) -> None:
    """A key whose rate is off is not limited by the default, and others of its project are."""
    project = create_project(two_workers)
    with connected(open_engine(two_workers.database_url)) as connection:
        free = create_key(connection, project.id, "free", event_rate=0)
    for key, second in ((free, "202"), (project.key, "429")):
        with closing(HttpClient(two_workers, key)) as client:
            assert send(client, [make_event(project.id) for _ in range(1000)]) == "202"
            assert send(client, [make_event(project.id) for _ in range(1000)]) == second
