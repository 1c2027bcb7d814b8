"""The metrics page of a running service: it adds up, whatever became of the workers."""

import json
import re
import shutil
import signal
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from server.caller import Quota
from server.events.problems import Reason
from server.storage.connection import connected, open_engine
from server.storage.quotas import Change, lock_standings, set_quota, take_events
from tests.support.clients import Refusal, Tenant, open_tenant
from tests.support.events import to_message
from tests.support.forwarding import QUEUE_ALONE
from tests.support.services import (
    ROOT,
    Service,
    ask,
    running_service,
    wait_for,
    wait_until,
)

DEPLOY = ROOT / "scripts/deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/productgraph.json"
NAME = re.compile(r"productgraph_\w+")
# What a load changes, and nothing else does.
COUNTED = re.compile(
    r"productgraph_(requests_total|events_(accepted|rejected|duplicate)_total|request_\w+_count"
    r"|request_events_sum|writer_group_rows_sum|database_errors_total)"
)
CONNECTIONS = 20
# A page is slow on a busy machine.
PAGE_SECONDS = 60
# What events are changed to, and what field and reason their rejection is counted under.
REJECTED: list[tuple[dict[str, Any], str, str]] = [
    ({"event_id": ""}, "event_id", "required"),
    ({"session.id": "x" * 256}, "session.id", "too_long"),
    ({"project_id": "proj_other"}, "project_id", "wrong_project"),
    ({"event.type": 'a"b\nc'}, "event.type", "unknown_value"),
    ({"event.type": "ui.hover"}, "event.type", "unknown_value"),
    ({"metadata": json.loads('{"a":' * 40 + "1" + "}" * 40)}, "metadata", "too_deep"),
    ({"page.title": "x" * 110_000}, "event", "too_large"),
]
MISTYPED: list[tuple[dict[str, Any], str, str]] = [
    ({"event.timestamp": "yesterday"}, "event.timestamp", "invalid_timestamp"),
    ({"metadata": [1]}, "metadata", "wrong_type"),
    ({"page.path": 1}, "page.path", "wrong_type"),
    ({"event.sequence": 2**70}, "event.sequence", "out_of_range"),
]

Samples = Counter[str]


def spell(name: str, **labels: str) -> str:
    """Return a sample's name and labels as one text."""
    return " ".join([f"productgraph_{name}", *(f"{n}={v}" for n, v in sorted(labels.items()))])


def read_page(service: Service) -> list[Metric]:
    """Return the metrics as Prometheus reads them."""
    with urlopen(service.metrics_url, timeout=PAGE_SECONDS) as answer:
        return list(text_string_to_metric_families(answer.read().decode()))


def read_whole_page(service: Service) -> list[Metric]:
    """Return the metrics once those are among them that are absent while the database is busy."""
    pages: list[list[Metric]] = []

    def is_whole() -> bool:
        pages.append(read_page(service))
        return any(metric.name == "productgraph_outbox_pending" for metric in pages[-1])

    wait_until(is_whole)
    return pages[-1]


def read_samples(service: Service) -> Samples:
    """Return the value of each sample on the page."""
    samples = [sample for metric in read_page(service) for sample in metric.samples]
    return Counter(
        {
            spell(sample.name.removeprefix("productgraph_"), **sample.labels): int(sample.value)
            for sample in samples
        }
    )


def count_since(before: Samples, service: Service) -> Samples:
    """How far the counters have come."""
    now = read_samples(service)
    return (
        Counter({name: now[name] - before[name] for name in now if COUNTED.match(name)}) - Counter()
    )


class Load:
    """Requests over both protocols, and what they should have changed on the page."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant
        self.expected: Samples = Counter()

    @property
    def project(self) -> str:
        """The project that it sends events for."""
        return self._tenant.project.id

    def run(self) -> None:
        """Send everything, each request over a connection of its own."""
        for _ in range(CONNECTIONS):
            self.send("http", self.make_events(5))
            self.send("grpc", self.make_events(3))
        for protocol in ("http", "grpc"):
            events = self.make_events(4)
            self.send(protocol, events)
            self.send(protocol, [*events, *self.make_events(1)], duplicates=4)
            self.send(protocol, self.make_events(1) * 3, duplicates=2)
            self.send(protocol, self.make_events(2), rejected=REJECTED)
            self.send(protocol, [], rejected=REJECTED[:1])
            self.send(protocol, [])
        self.send("http", self.make_events(1), rejected=MISTYPED)
        self.send("grpc", [], rejected=[(b"\x0a\x01\xff", "event_id", "invalid_encoding")])
        self._refuse()

    def make_events(self, count: int) -> list[dict[str, Any]]:
        """Events that nobody has sent."""
        return [self._tenant.make_event({"event_id": uuid.uuid4().hex}) for _ in range(count)]

    def send(
        self,
        protocol: str,
        events: Sequence[dict[str, Any]],
        duplicates: int = 0,
        rejected: Sequence[tuple[dict[str, Any] | bytes, str, str]] = (),
    ) -> None:
        """Send good events and bad ones in one request."""
        bad = [
            change if isinstance(change, bytes) else self._tenant.make_event(change)
            for change, _, _ in rejected
        ]
        batch = [*events, *bad]
        if protocol == "http":
            answer = self._tenant.post_events(batch)
        else:
            encoded = [e if isinstance(e, bytes) else to_message(e) for e in batch]
            answer = self._tenant.ingest(encoded)
        assert (answer["accepted"], answer["rejected"]) == (len(events), len(rejected))
        self._expect_request(protocol, "202" if protocol == "http" else "OK")
        for name in ("decode_seconds_count", "store_seconds_count", "events_count"):
            self._expect(f"request_{name}", protocol=protocol)
        self._expect("request_events_sum", len(batch), protocol=protocol)
        self._expect("events_accepted_total", len(events), protocol=protocol)
        self._expect("events_duplicate_total", duplicates)
        self._expect("writer_group_rows_sum", len(events))
        for _, field, reason in rejected:
            self._expect("events_rejected_total", field=field, reason=reason)

    def _refuse(self) -> None:
        assert self._tenant.post(b"{").status == 400
        assert self._tenant.post({"events": []}, x_pg_api_key="nonsense").status == 401
        assert self._tenant.post({"events": []}, content_type="text/plain").status == 415
        for status in ("400", "401", "415"):
            self._expect_request("http", status)
        with pytest.raises(Refusal, match="INVALID_ARGUMENT"):
            self._tenant.call(b"\xff")
        with pytest.raises(Refusal, match="UNAUTHENTICATED"):
            self._tenant.call(b"", key="nonsense")
        for code in ("INVALID_ARGUMENT", "UNAUTHENTICATED"):
            self._expect_request("grpc", code)

    def _expect_request(self, protocol: str, status: str) -> None:
        self._expect("requests_total", protocol=protocol, status=status)
        self._expect("request_seconds_count", protocol=protocol)

    def _expect(self, name: str, count: int = 1, **labels: str) -> None:
        self.expected += Counter({spell(name, **labels): count})


@pytest.fixture(scope="module")
def pair(create_migrated: Callable[[], str]) -> Iterator[Service]:
    """Provide a service of two workers that nobody else uses, and that can deliver nothing."""
    settings = {"DATABASE_URL": create_migrated(), "WORKERS": "2"}
    with connected(open_engine(settings["DATABASE_URL"])) as connection:
        set_quota(connection, "proj_quota", Quota(monthly=1000))
        month = lock_standings(connection, ["proj_quota"])["proj_quota"][0]
        take_events(connection, [Change("proj_quota", "monthly", month.began, 500)])
    with running_service(settings | QUEUE_ALONE) as service:
        yield service


@pytest.fixture
def load(pair: Service) -> Iterator[Load]:
    """Provide a load for that service."""
    with open_tenant(pair) as tenant:
        yield Load(tenant)


def settle(load: Load, before: Samples, service: Service) -> None:
    """Fails unless the page comes to what the load should have changed, and no further."""
    wait_for(lambda: count_since(before, service), load.expected)


def find_busy(service: Service) -> set[int]:
    """Return the processes that have answered requests, by their log."""
    return {record["pid"] for record in service.read_log() if record["message"] == "request"}


def test_metrics_count_every_event_of_a_known_load(pair: Service, load: Load) -> None:
    """A known load over both protocols and both workers is on the page, to the last event."""
    before = read_samples(pair)
    load.run()
    settle(load, before, pair)
    wait_until(lambda: find_busy(pair) >= {worker.pid for worker in pair.find_workers()})
    reasons = {label for name in load.expected for label in name.split() if "reason=" in label}
    assert reasons == {f"reason={reason}" for reason in Reason}


@pytest.mark.slow
def test_counts_of_a_killed_worker_stay(pair: Service, load: Load) -> None:
    """What a worker has counted stays on the page when it is killed; its successor goes on."""
    before = read_samples(pair)
    load.run()
    settle(load, before, pair)
    victim = pair.find_workers()[0]
    victim.kill()
    restarts, workers = spell("worker_restarts_total", command="worker"), spell("workers")
    wait_until(lambda: read_samples(pair)[restarts] == before[restarts] + 1)
    wait_until(lambda: read_samples(pair)[workers] == 2)
    assert count_since(before, pair) == load.expected
    load.run()
    settle(load, before, pair)


@pytest.mark.slow
def test_replaced_workers_lose_no_count(pair: Service, load: Load) -> None:
    """A rolling restart loses no count, and is no restart by death."""
    before = read_samples(pair)
    load.run()
    old = pair.find_workers()
    pair.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not any(worker.is_running() for worker in old), seconds=120)
    settle(load, before, pair)
    restarts = spell("worker_restarts_total", command="worker")
    assert read_samples(pair)[restarts] == before[restarts]
    wait_until(lambda: read_samples(pair)[spell("workers")] == len(pair.find_workers()))


def test_metrics_show_what_waits_for_each_provider(pair: Service, load: Load) -> None:
    """What waits for a provider is on the page, as the database has it."""
    before = read_samples(pair)
    load.run()
    settle(load, before, pair)
    counted = read_samples(pair)
    stored = sum(
        counted[spell("events_accepted_total", protocol=protocol)] for protocol in ("http", "grpc")
    )
    pending = stored - counted[spell("events_duplicate_total")]
    lane = {"provider": "mixpanel"}
    pages = []

    def has_pending() -> bool:
        pages.append(read_samples(pair))
        waiting = pages[-1][spell("outbox_pending", **lane)]
        return waiting == pending and pages[-1][spell("outbox_oldest_seconds", **lane)] > 0

    wait_until(has_pending)
    now = pages[-1]
    assert spell("events_delivered_total", **lane) in now
    assert now[spell("outbox_dead", **lane)] == now[spell("lane_stopped", **lane)] == 0


def test_the_used_share_of_a_quota_is_on_the_page(pair: Service) -> None:
    """The page says how much of each project's quota is used."""
    shares = [m.samples for m in read_whole_page(pair) if m.name.endswith("quota_used")]
    [[(_, labels, share, *_)]] = shares
    assert (labels, share) == ({"project": "proj_quota", "period": "monthly"}, 0.5)


def test_metrics_have_one_page_in_both_formats(pair: Service) -> None:
    """The page is at /metrics alone, in both formats that Prometheus asks for."""
    place = pair.metrics_url.removesuffix("/metrics")
    assert [ask(f"{place}{path}") for path in ("/", "/metrics/", "/nowhere")] == [404, 404, 404]
    wanted = {"Accept": "application/openmetrics-text; version=1.0.0"}

    def find_names() -> set[str]:
        request = Request(pair.metrics_url, headers=wanted)
        with urlopen(request, timeout=PAGE_SECONDS) as answer:
            assert answer.headers.get_content_type() == "application/openmetrics-text"
            found = openmetrics.text_string_to_metric_families(answer.read().decode())
            return {metric.name for metric in found}

    # One page is read after the other, and what only the database knows may be missing in one.
    wait_until(lambda: find_names() == {metric.name for metric in read_whole_page(pair)})


def find_expressions() -> list[str]:
    """Return the PromQL of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [target["expr"].replace("$__rate_interval", "5m") for target in targets]


def test_projects_add_up_to_the_whole(pair: Service, load: Load) -> None:
    """What is counted by project is the same in all as what is counted for the service."""
    before = read_samples(pair)
    load.run()
    totals = {
        "project_events_accepted_total": "events_accepted_total",
        "project_events_duplicate_total": "events_duplicate_total",
        "project_events_rejected_total": "events_rejected_total",
    }

    def add_up(samples: Samples, name: str) -> int:
        names = [each for each in samples if each.split()[0] == f"productgraph_{name}"]
        return sum(samples[each] for each in names)

    def compare() -> bool:
        samples = read_samples(pair)
        return all(add_up(samples, of) == add_up(samples, whole) for of, whole in totals.items())

    wait_until(lambda: add_up(read_samples(pair), "project_bytes_total") > 0 and compare())
    own = spell("project_events_accepted_total", project=load.project)
    sent = sum(load.expected[spell("events_accepted_total", protocol=p)] for p in ("http", "grpc"))
    wait_for(lambda: read_samples(pair)[own], sent)
    settle(load, before, pair)  # or what comes late would be counted in the next test


def test_dashboard_and_alerts_use_only_exported_metrics(pair: Service, load: Load) -> None:
    """Every metric and label in the dashboard and the alert rules is on a real page."""
    before = read_samples(pair)
    load.run()
    settle(load, before, pair)
    page = read_whole_page(pair)
    names = {sample.name for metric in page for sample in metric.samples}
    labels = {name for metric in page for sample in metric.samples for name in sample.labels}
    for text in (*find_expressions(), (DEPLOY / "alerts.yml").read_text()):
        assert set(NAME.findall(text)) <= names
        grouped = {
            name for names in re.findall(r"by \(([^)]*)\)", text) for name in names.split(", ")
        }
        matched = set(re.findall(r"[{,] ?(\w+)[=!]", text))
        assert grouped | matched <= labels | {"instance", "job"}


def test_prometheus_accepts_rules_and_dashboard_expressions(tmp_path: Path) -> None:
    """Prometheus accepts its configuration, the alert rules and the dashboard's expressions."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(find_expressions())
    ]
    recorded = tmp_path / "dashboard.yml"
    recorded.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    for arguments in (
        ("check", "config", str(DEPLOY / "prometheus.yml")),
        ("check", "rules", str(recorded)),
    ):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def give(name: str, values: str, **labels: str) -> dict[str, str]:
    """Return a series in promtool's terms: `0+1x9` is 0 and nine more, a minute apart."""
    inside = ", ".join(f'{name}="{text}"' for name, text in labels.items())
    return {"series": f"{name}{{{inside}}}", "values": values}


LANE = {"provider": "mixpanel"}
HERE = {"instance": "here"}
HEALTHY = [
    give("up", "1x60", job="productgraph", **HERE),
    give("productgraph_database_up", "1x60", **HERE),
    give("productgraph_requests_total", "0+6000x60", protocol="http", status="202"),
    give("productgraph_requests_total", "0+60x60", protocol="http", status="401"),
    give("productgraph_requests_total", "0+6x60", protocol="grpc", status="UNAVAILABLE"),
    give("productgraph_request_seconds_bucket", "0+60x60", protocol="http", le="0.01"),
    give("productgraph_request_seconds_bucket", "0+60x60", protocol="http", le="+Inf"),
    give("productgraph_outbox_oldest_seconds", "2x60", **LANE),
    give("productgraph_outbox_dead", "7x60", **LANE),
    give("productgraph_lane_stopped", "0x60", **LANE),
    give("productgraph_worker_restarts_total", "0x20 1x40", command="worker", **HERE),
    give("productgraph_events_accepted_total", "0+6000x60", protocol="http"),
    give("productgraph_events_rejected_total", "0+60x60", field="event_id", reason="required"),
    give("productgraph_requests_total", "0+60x60", protocol="http", status="429"),
    give("productgraph_rejected_events_dropped_total", "5x60", **HERE),
    give("productgraph_partition_failures_total", "0x20 1x40", **HERE),
    give("productgraph_events_default_rows", "100+5x60", **HERE),
    give("productgraph_writer_waiting_bytes", "1000x60", **HERE),
    give("productgraph_writer_waiting_limit_bytes", "64000000x60", **HERE),
    give("productgraph_provider_requests_total", "0+60x60", outcome="accepted", **LANE),
    give("productgraph_provider_requests_total", "0+6x60", outcome="throttled", **LANE),
    give("productgraph_provider_requests_total", "0+60x60", outcome="refused", **LANE),
    give("productgraph_api_keys_ending", "0x60", **HERE),
    give("productgraph_project_quota_used", "0.7x60", project="busy", period="daily"),
    give("productgraph_project_events_accepted_total", "0+100x60", project="busy"),
    give("productgraph_project_events_accepted_total", "0+10x20 200x40", project="small"),
    give("productgraph_project_events_accepted_total", "0+100x20 2000x40", project="other"),
]
# What is different if an alert has to fire, and the labels that it then has.
TROUBLES: dict[str, tuple[list[dict[str, str]], dict[str, str]]] = {
    "ServiceDown": (
        [give("up", "0x60", job="productgraph", **HERE)],
        {"job": "productgraph", "severity": "critical"} | HERE,
    ),
    "DatabaseUnavailable": (
        [give("productgraph_database_up", "0x60", **HERE)],
        {"severity": "critical"} | HERE,
    ),
    "RequestsFailing": (
        [give("productgraph_requests_total", "0+90x60", protocol="http", status="503")],
        {"severity": "critical"},
    ),
    "LatencyHigh": (
        [
            give("productgraph_request_seconds_bucket", "0+50x60", protocol="http", le="0.01"),
            give("productgraph_request_seconds_bucket", "0+50x60", protocol="http", le="1.0"),
            give("productgraph_request_seconds_bucket", "0+60x60", protocol="http", le="2.5"),
        ],
        {"severity": "warning", "protocol": "http"},
    ),
    "OutboxLagging": (
        [give("productgraph_outbox_oldest_seconds", "0+60x60", **LANE)],
        {"severity": "warning"} | LANE,
    ),
    "DeadEventsRising": (
        [give("productgraph_outbox_dead", "7x50 8x10", **LANE)],
        {"severity": "warning"} | LANE,
    ),
    "LaneStopped": (
        [give("productgraph_lane_stopped", "0x50 1x10", **LANE)],
        {"severity": "critical"} | LANE,
    ),
    "WorkersRestarting": (
        [give("productgraph_worker_restarts_total", "0x45 3+1x15", command="worker", **HERE)],
        {"severity": "warning"} | HERE,
    ),
    "EventsRejected": (
        [
            give(
                "productgraph_events_rejected_total",
                "0+600x60",
                field="event_id",
                reason="required",
            )
        ],
        {"severity": "warning"},
    ),
    "RequestsLimited": (
        [give("productgraph_requests_total", "0+600x60", protocol="http", status="429")],
        {"severity": "warning"},
    ),
    "RejectedEventsDropped": (
        [give("productgraph_rejected_events_dropped_total", "5x50 6x10", **HERE)],
        {"severity": "warning"} | HERE,
    ),
    "WaitingNearLimit": (
        [give("productgraph_writer_waiting_bytes", "1000x40 60000000x20", **HERE)],
        {"severity": "warning"} | HERE,
    ),
    "PartitionsFailing": (
        [give("productgraph_partition_failures_total", "0x5 0+1x55", **HERE)],
        {"severity": "warning"} | HERE,
    ),
    "EventsDefaultGrowing": (
        [give("productgraph_events_default_rows", "100+50x60", **HERE)],
        {"severity": "warning"},
    ),
    "ProviderFailing": (
        [give("productgraph_provider_requests_total", "0+200x60", outcome="throttled", **LANE)],
        {"severity": "warning"} | LANE,
    ),
    "ApiKeyExpiring": (
        [give("productgraph_api_keys_ending", "0x40 2x20", **HERE)],
        {"severity": "warning"},
    ),
    "ProjectSilent": (
        [give("productgraph_project_events_accepted_total", "0+200x20 4000x40", project="busy")],
        {"severity": "warning", "project": "busy"},
    ),
    "QuotaNearEnd": (
        [give("productgraph_project_quota_used", "0.9x60", project="busy", period="daily")],
        {"severity": "warning", "project": "busy", "period": "daily"},
    ),
}
# Of those that take longer to fire, a sample stands for two minutes instead of one.
SLOW = ("ProjectSilent",)


@pytest.mark.parametrize("alert", [None, *TROUBLES])
def test_each_alert_fires_alone_in_its_trouble(alert: str | None, tmp_path: Path) -> None:
    """Each alert fires in the trouble that it is for, by itself, and none when all is well."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    changed, labels = TROUBLES[alert] if alert else ([], {})
    series = {each["series"]: each for each in (*HEALTHY, *changed)}
    firing = {"alertname": alert, "alertstate": "firing"} | labels if alert else {}
    inside = ", ".join(f'{name}="{text}"' for name, text in firing.items())
    expected = [{"labels": f"ALERTS{{{inside}}}", "value": 1}] if alert else []
    pace = 2 if alert in SLOW else 1
    case = {
        "interval": f"{pace}m",
        "input_series": list(series.values()),
        "promql_expr_test": [
            {"expr": "ALERTS", "eval_time": f"{58 * pace}m", "exp_samples": expected},
        ],
    }
    test = tmp_path / "alerts_test.yml"
    test.write_text(json.dumps({"rule_files": [str(DEPLOY / "alerts.yml")], "tests": [case]}))
    done = subprocess.run(
        [promtool, "test", "rules", str(test)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_and_documented() -> None:
    """Every alert is tried out above, and leads to the section of its name."""
    rules = (DEPLOY / "alerts.yml").read_text()
    names = re.findall(r"alert: (\w+)", rules)
    assert names == list(TROUBLES)
    anchors = [re.sub(r"(?<!^)([A-Z])", r"-\1", name).lower() for name in names]
    assert re.findall(r"runbook_url: \S+/OPERATIONS\.md#(\S+)", rules) == anchors
