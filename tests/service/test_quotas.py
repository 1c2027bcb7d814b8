"""What a project may send in a day and in a month, over both protocols and on all machines."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any, cast

import grpc
import http_sf
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from server.caller import Quota
from server.storage.connection import connected, open_engine
from server.storage.keys import create_key
from server.storage.quotas import list_standings, set_quota
from tests.support.clients import Tenant, accepted, bind_ingest, encode_request, open_tenant
from tests.support.events import make_event, to_message
from tests.support.load import STORED, Client, GrpcClient, HttpClient, send
from tests.support.projects import Project
from tests.support.services import Service, running_service, wait_for, wait_until

MONTH_LEFT = """
SELECT extract(epoch FROM date_trunc('month', utc) + interval '1 month' - utc)
  FROM (SELECT clock_timestamp() AT TIME ZONE 'UTC' AS utc) AS clock
"""


def give_quota(tenant: Tenant, **limits: int) -> None:
    """Give a tenant's project a quota, before its key is used for the first time."""
    with connected(open_engine(tenant.service.database_url)) as connection:
        set_quota(connection, tenant.project.id, Quota(**limits))


def read_left(tenant: Tenant, period: str = "monthly") -> int:
    """Return what is left of a quota, by what the service says in an answer."""
    field = tenant.post({"events": []}).headers["RateLimit"]
    limits: Any = http_sf.parse(field.encode(), tltype="list")
    return int(dict(limits)[period]["r"])


def count_month(tenant: Tenant) -> float:
    """Return the seconds to the end of the month, by the database's clock."""
    with tenant.database.cursor() as cursor:
        cursor.execute(MONTH_LEFT)
        [(seconds,)] = cursor.fetchall()
    return float(seconds)


def test_a_request_over_its_quota_is_answered_429(tenant: Tenant) -> None:
    """It is refused as a whole until the period ends, and answers tell the policies."""
    give_quota(tenant, daily=10**9, monthly=100)
    assert tenant.post_events(tenant.make_events(90)) == accepted(90)
    assert len(tenant.take_rows()) == 90
    seconds = count_month(tenant)
    answer = tenant.post({"events": [{}, *tenant.make_events(10)]}, origin="https://a.example")
    assert (answer.status, answer.json) == (429, {"error": "monthly quota exceeded: 100 events"})
    assert count_month(tenant) - 1 <= int(answer.headers["Retry-After"]) <= seconds + 1
    assert tenant.read_rows() == []
    policies: Any = http_sf.parse(answer.headers["RateLimit-Policy"].encode(), tltype="list")
    daily, monthly = (dict(policies)[period] for period in ("daily", "monthly"))
    assert daily == {"q": 10**9, "qu": "events", "w": 86_400}
    assert (monthly["q"], monthly["w"] // 86_400 in range(28, 32)) == (100, True)
    assert read_left(tenant) == 10
    assert tenant.post_events(tenant.make_events(10)) == accepted(10)
    assert tenant.post(b"no JSON").status == 429


def test_both_protocols_share_one_quota(tenant: Tenant) -> None:
    """Over gRPC it is RESOURCE_EXHAUSTED with RetryInfo; all keys of a project have one quota."""
    give_quota(tenant, monthly=100)
    assert tenant.ingest(map(to_message, tenant.make_events(60))) == accepted(60)
    with connected(open_engine(tenant.service.database_url)) as connection:
        key = create_key(connection, tenant.project.id, "other")
    other = Tenant(tenant.service, Project(tenant.project.id, key), tenant.database)
    assert other.post_events(other.make_events(40)) == accepted(40)
    request, seconds = encode_request([to_message(other.make_event())]), count_month(tenant)
    with (
        grpc.insecure_channel(tenant.service.grpc_target) as channel,
        pytest.raises(grpc.RpcError) as failure,
    ):
        bind_ingest(channel)(request, metadata=(("x-pg-api-key", key),))
    call = cast(grpc.Call, failure.value)
    assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call.details() == "monthly quota exceeded: 100 events"
    status = Status.FromString(dict(call.trailing_metadata())["grpc-status-details-bin"])
    retry = RetryInfo()
    assert status.details[0].Unpack(retry)
    assert count_month(tenant) - 1 <= retry.retry_delay.seconds <= seconds + 1


def test_a_quota_counts_what_a_rate_lets_pass(tenant: Tenant) -> None:
    """Rejected and repeated events use quota; what a rate refuses, or is not stored, uses none."""
    give_quota(tenant, monthly=1000)
    with connected(open_engine(tenant.service.database_url)) as connection:
        key = create_key(connection, tenant.project.id, "limited", event_rate=1)
    slow = Tenant(tenant.service, Project(tenant.project.id, key), tenant.database)
    assert slow.post_events(slow.make_events(100)) == accepted(100)
    assert slow.post({"events": slow.make_events(100)}).status == 429
    assert read_left(tenant) == 900
    with tenant.failing_storage():
        assert tenant.post({"events": tenant.make_events(500)}).status == 500
    wait_for(lambda: read_left(tenant), 900)
    assert tenant.post({"events": [{}] * 50}, prefer="handling=strict").status == 422
    assert tenant.post_events([{}] * 50)["rejected"] == 50
    assert tenant.post_events(tenant.make_events(100)) == accepted(100)
    assert read_left(tenant) == 700
    assert len(tenant.read_rows()) == 100


def test_a_quota_is_set_shown_and_lifted(tenant: Tenant) -> None:
    """A quota is given, shown with what is used, changed and taken away; nonsense is refused."""
    run, project = tenant.service.run, tenant.project.id
    named = ("--project", project)
    assert run("quota", "set", *named, "--daily", "1000").returncode == 0
    assert run("quota", "set", *named, "--monthly", "5000").returncode == 0
    assert tenant.post_events(tenant.make_events(250)) == accepted(250)

    def read(*arguments: str) -> list[dict[str, Any]]:
        lines = map(json.loads, run("quota", *arguments, "--json").stdout.splitlines())
        return [line for line in lines if line.get("project_id", project) == project]

    for standings in (read("list"), read("show", *named)):
        assert [(each["period"], each["quota"]) for each in standings] == [
            ("daily", 1000),
            ("monthly", 5000),
        ]
        assert all(250 <= each["used"] == each["quota"] - each["left"] for each in standings)
        assert all(each["ends_at"].endswith("T00:00:00Z") for each in standings)
    assert f"{project:20}  daily" in run("quota", "list").stdout
    assert "monthly              5000" in run("quota", "show", *named).stdout
    assert run("quota", "set", *named, "--daily", "off").returncode == 0
    assert [each["period"] for each in read("list")] == ["monthly"]
    assert run("quota", "set", *named, "--monthly", "off").returncode == 0
    assert read("list") == []
    for arguments, status in (
        (("show", *named), 1),
        (("set", *named), 2),
        (("set", *named, "--daily", "0"), 2),
        (("set", *named, "--daily", "1e6"), 2),
        (("set", *named, "--daily", "9" * 5000), 2),
        (("set", "--daily", "5"), 2),
    ):
        done = run("quota", *arguments)
        assert (done.returncode, done.stdout) == (status, "")


QUOTA, TOLERANCE = 100_000, 1000
QUIET_SECONDS = 25.0


class Press:
    """Clients that send to one service after the other, as fast as they are answered."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.sent: Counter[str] = Counter()
        self.stored = 0
        self.stored_at = time.monotonic()
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def run(self, services: Sequence[Service], place: int, kind: Callable[..., Client]) -> None:
        """Send to the service that is at a place, until told to stop."""
        draw = random.Random(place)
        while not self.stop.is_set():
            with closing(kind(services[place], self.project.key)) as client:
                status, service = "", services[place]
                while not self.stop.is_set() and service is services[place]:
                    events = [make_event(self.project.id) for _ in range(draw.randint(1, 200))]
                    status = send(client, events)
                    self._note(status, len(events))
                    self.stop.wait(0.0 if status in STORED else 0.05)

    def _note(self, status: str, count: int) -> None:
        with self._lock:
            self.sent[status] += count
            if status in STORED:
                self.stored, self.stored_at = self.stored + count, time.monotonic()


@pytest.mark.slow
def test_a_quota_holds_over_machines_whatever_dies(
    create_migrated: Callable[[], str], record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Two services accept one quota, within 1 % or 1,000, over a kill and a restart."""
    settings = {"DATABASE_URL": create_migrated(), "WORKERS": "2"}
    with ExitStack() as stack:
        services = [stack.enter_context(running_service(settings)) for _ in range(2)]
        tenant = stack.enter_context(open_tenant(services[0]))
        if count_month(tenant) < 600:
            pytest.skip("the month ends")
        give_quota(tenant, monthly=QUOTA)
        press = Press(tenant.project)
        kinds: list[Callable[..., Client]] = [HttpClient, GrpcClient, HttpClient]
        threads = [
            threading.Thread(target=press.run, args=(services, place, kind))
            for kind in kinds
            for place in (0, 1)
        ]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(press.stop.set)
        wait_until(lambda: press.stored > 0.3 * QUOTA, 180)
        services[0].find_workers()[0].kill()
        wait_until(lambda: press.stored > 0.6 * QUOTA, 180)
        assert services[1].stop() == 0
        services[1] = stack.enter_context(running_service(settings))
        wait_until(lambda: time.monotonic() > press.stored_at + QUIET_SECONDS, 300)
        press.stop.set()
        for thread in threads:
            thread.join()
        with tenant.database.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM events")
            [(stored,)] = cursor.fetchall()
        with connected(open_engine(services[0].database_url)) as connection:
            [(_, standing)] = list_standings(connection)
        figures = {"set": QUOTA, "stored": stored, "acknowledged": press.stored}
        record_testsuite_property("quota", figures | {"counted": standing.used} | press.sent)
        assert QUOTA - TOLERANCE <= stored <= QUOTA + TOLERANCE
        assert press.stored <= stored
        assert press.sent.keys() >= {"429", "RESOURCE_EXHAUSTED"}
