"""Each alert, provoked on a running service and seen to fire by a real Prometheus.

The rules are those of scripts/deploy, but that a trouble need last for two seconds only.
"""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import psycopg2
import pytest
import yaml
from psycopg2.extensions import parse_dsn

from tests.support.background import repeating
from tests.support.clients import Tenant, open_tenant
from tests.support.events import to_message
from tests.support.projects import Project
from tests.support.provider_servers import AmplitudeServer, MixpanelServer, Reply, Script
from tests.support.services import ROOT, Service, running_service, wait_for, wait_until

pytestmark = pytest.mark.slow

DEPLOY = ROOT / "scripts/deploy"
RULES = (DEPLOY / "alerts.yml").read_text()
NAMES = re.findall(r"- alert: (\w+)", RULES)
SECRET = "secret"
PATIENCE = 180.0
PLACE = re.compile(r'msg="?Listening on"? address=(127\.0\.0\.1:\d+)')

# Takes the name of an alert and what is known of its firing.
Note = Callable[[str, object], None]


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, its file of targets, and its Alertmanager."""

    url: str
    targets: Path
    alertmanager: str

    def watch(self, service: Service) -> None:
        """Read this service's metrics from now on, instead of others."""
        target = service.metrics_url.removeprefix("http://").removesuffix("/metrics")
        written = self.targets.with_suffix(".new")
        written.write_text(json.dumps([{"targets": [target]}]))
        written.rename(self.targets)

    def ask(self, path: str, **parameters: str) -> Any:
        """Return what its API answers."""
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def find_alerts(self, *states: str) -> dict[str, str]:
        """Return the alerts in these states, with what they say."""
        return {
            alert["labels"]["alertname"]: alert["annotations"]["summary"]
            for alert in self.ask("alerts")["alerts"]
            if alert["state"] in states
        }

    def find_receivers(self, name: str) -> list[str]:
        """Return the receivers of an alert."""
        with urlopen(f"{self.alertmanager}/api/v2/alerts", timeout=30) as answer:
            alerts = json.load(answer)
        told = [alert for alert in alerts if alert["labels"]["alertname"] == name]
        return [receiver["name"] for alert in told for receiver in alert["receivers"]]

    def has_data(self, expression: str) -> bool:
        """Return whether an expression has a value that is a number."""
        found = self.ask("query", query=expression)["result"]
        return any(sample["value"][1] != "NaN" for sample in found)

    def wait_for_alerts(self, names: Sequence[str], note: Note) -> None:
        """Wait until each of these alerts has fired."""
        began, missing = time.monotonic(), set(names)
        while missing:
            for name, said in self.find_alerts("firing").items():
                if name in missing:
                    missing.remove(name)
                    note(name, f"fired after {time.monotonic() - began:.0f} s: {said}")
            assert time.monotonic() - began < PATIENCE, f"did not fire: {missing}"
            time.sleep(0.2)


# How ProjectSilent asks whether nothing comes; there is no time here for its five minutes.
SILENCE = "[5m])) > 0\n"


@contextmanager
def running_program(program: str, directory: Path, **options: object) -> Iterator[str]:
    """Provide the address of a program's port; skip the test if it is not installed."""
    if (path := shutil.which(program)) is None:
        pytest.skip(f"{program} is not installed")
    log = directory / f"{program}.log"
    given = {"web.listen-address": "127.0.0.1:0", **options}
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [path, *(f"--{name.replace('_', '.')}={text}" for name, text in given.items())],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        wait_until(lambda: PLACE.search(log.read_text()) or process.poll() is not None)
        place = PLACE.search(log.read_text())
        assert place, log.read_text()
        yield place[1]
    finally:
        process.kill()
        process.wait()


@contextmanager
def running_prometheus(directory: Path) -> Iterator[Prometheus]:
    """Provide a Prometheus that reads every second, and tells an Alertmanager."""
    with ExitStack() as stack:
        alertmanager = stack.enter_context(
            running_program(
                "prometheus-alertmanager",
                directory,
                config_file=DEPLOY / "alertmanager.yml",
                storage_path=directory / "alertmanager",
                **{"cluster.listen-address": ""},
            )
        )
        rules = re.sub(r"\bfor: \d+m", "for: 2s", RULES).replace(SILENCE, "[5s])) > 0\n")
        (directory / "alerts.yml").write_text(rules)
        discovery = [{"files": ["targets.json"], "refresh_interval": "1s"}]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [{"job_name": "productgraph", "file_sd_configs": discovery}],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        place = stack.enter_context(
            running_program(
                "prometheus",
                directory,
                config_file=directory / "prometheus.yml",
                storage_tsdb_path=directory / "prometheus",
            )
        )
        yield Prometheus(f"http://{place}", directory / "targets.json", f"http://{alertmanager}")


@dataclass(frozen=True)
class Scene:
    """A service with all that it depends on, to which things can be done."""

    service: Service
    tenant: Tenant
    amplitude: AmplitudeServer
    mixpanel: MixpanelServer
    prometheus: Prometheus

    def post_new(self, count: int = 1, age: timedelta = timedelta(), **fields: str) -> int:
        """Send events that were never sent, of that age; return the status."""
        moment = datetime.now(UTC) - age
        named = {name.replace("_", "."): text for name, text in fields.items()}
        changes = {"event.timestamp": moment.isoformat(), **named}
        events = [
            self.tenant.make_event({"event_id": f"evt_{time.monotonic_ns()}_{number}", **changes})
            for number in range(count)
        ]
        return self.tenant.post({"events": events}).status

    def execute(self, statement: str) -> None:
        """Run a statement in the database."""
        with self.tenant.database.cursor() as cursor:
            cursor.execute(statement)

    @contextmanager
    def locked(self, table: str) -> Iterator[None]:
        """Hold a table while the context lasts."""
        with closing(psycopg2.connect(self.service.database_url)) as connection:
            connection.cursor().execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            yield


def persisting(action: Callable[[], object], pause: float = 0.5) -> AbstractContextManager[None]:
    """Do something again and again while the context lasts, whether it fails or not."""

    def run() -> None:
        with suppress(OSError, HTTPException):  # a worker may just be replaced
            action()

    return repeating(run, pause)


@contextmanager
def opened_scene(url: str, directory: Path) -> Iterator[Scene]:
    """Start everything."""
    with ExitStack() as stack:
        prometheus = stack.enter_context(running_prometheus(directory))
        amplitude = stack.enter_context(AmplitudeServer(SECRET))
        mixpanel = stack.enter_context(MixpanelServer(SECRET))
        settings = {
            "DATABASE_URL": url,
            "MAX_WAITING_MB": "1",
            "ANALYTICS_ENABLED": "true",
            "AMPLITUDE_ENABLED": "true",
            "AMPLITUDE_API_KEY": SECRET,
            "AMPLITUDE_ENDPOINT": amplitude.url,
            "MIXPANEL_ENABLED": "true",
            "MIXPANEL_TOKEN": SECRET,
            "MIXPANEL_ENDPOINT": mixpanel.url,
        }
        service = stack.enter_context(running_service(settings))
        prometheus.watch(service)
        tenant = stack.enter_context(open_tenant(service))
        yield Scene(service, tenant, amplitude, mixpanel, prometheus)


def list_expressions() -> list[str]:
    """Return the PromQL of the dashboard's panels, as for a page that shows two minutes."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/productgraph.json").read_text())
    return [
        target["expr"].replace("$__rate_interval", "15s").replace("$instance", ".*")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


def check_calm(scene: Scene) -> None:
    """Send good events; find data for each panel, and no alert."""
    tenant, prometheus = scene.tenant, scene.prometheus
    assert scene.post_new(3) == 202
    event = tenant.make_event()

    def send_again() -> None:
        # A repeated event is no request to a provider, of which most shall fail later.
        tenant.post({"events": [event]})
        tenant.ingest([to_message(event)])

    with persisting(send_again):
        empty = list_expressions()
        deadline = time.monotonic() + PATIENCE
        while empty := [each for each in empty if not prometheus.has_data(each)]:
            assert time.monotonic() < deadline, f"No data: {empty}"
            time.sleep(0.5)
        wait_until(lambda: prometheus.has_data("count_over_time(up[1m]) > 15"), PATIENCE)
    # Before it had read anything it may have missed the service; and a busy machine may be slow.
    fired = 'max_over_time(ALERTS{alertstate="firing", alertname!~"ServiceDown|LatencyHigh"}[1h])'
    assert prometheus.ask("query", query=fired)["result"] == []


def provoke_bad_events(scene: Scene, note: Note) -> None:
    """Send events that are wrong, old or refused by a provider, and too many by a key that ends.

    They use up most of their project's quota, too.
    """
    tenant, service = scene.tenant, scene.service
    quota = ("--project", tenant.project.id, "--monthly", "15000")
    assert service.run("quota", "set", *quota).returncode == 0
    wait_until(lambda: "RateLimit" in tenant.post({"events": []}).headers)
    options = ("--project", tenant.project.id, "--rate", "1", "--expires", "3d")
    made = service.run("keys", "create", *options)
    limited = Tenant(service, Project(tenant.project.id, made.stdout.strip()), tenant.database)
    assert scene.post_new(age=timedelta(hours=-3)) == 202  # Mixpanel takes no such event
    assert [scene.post_new(600, age=timedelta(days=900)) for _ in range(2)] == [202, 202]
    with scene.locked("rejected_events"):
        for _ in range(12):
            assert scene.post_new(1000, event_type="wrong") == 202

    def send_more() -> None:
        # The first value of a counter is no increase to Prometheus, however large it is.
        limited.post({"events": tenant.make_events(50)})
        scene.post_new(5, event_type="wrong")

    with persisting(send_more):
        names = ("EventsRejected", "RejectedEventsDropped", "RequestsLimited")
        more = ("DeadEventsRising", "EventsDefaultGrowing", "ApiKeyExpiring", "QuotaNearEnd")
        scene.prometheus.wait_for_alerts((*names, *more), note)
    assert service.run("quota", "set", *quota[:3], "off").returncode == 0
    wait_until(lambda: "RateLimit" not in tenant.post({"events": []}).headers)


def provoke_silence(scene: Scene, note: Note) -> None:
    """Let a project send many events, and then none."""
    with open_tenant(scene.service) as tenant:
        for number in range(4):
            events = [tenant.make_event({"event_id": f"{number} {n}"}) for n in range(900)]
            assert tenant.post({"events": events}).status == 202
            time.sleep(2.0)  # for the first value of a counter is no increase
    scene.prometheus.wait_for_alerts(["ProjectSilent"], note)


def provoke_failing_providers(scene: Scene, note: Note) -> None:
    """Let one provider refuse our credentials, and the other throttle; what waits grows old."""
    scene.mixpanel.credential = "another"
    scene.amplitude.behave = lambda _: Script(Reply(429, b"{}"))
    age = "UPDATE outbox_payloads SET received_at = received_at - interval '10 minutes'"
    with persisting(scene.post_new), persisting(lambda: scene.execute(age), 5.0):
        names = ("LaneStopped", "ProviderFailing", "OutboxLagging")
        scene.prometheus.wait_for_alerts(names, note)


def provoke_waiting_requests(scene: Scene, note: Note) -> None:
    """Let requests wait for a locked table, nearly as many as may wait."""
    large = "x" * 90_000
    with ThreadPoolExecutor(14) as pool:

        def post_many() -> None:
            list(pool.map(lambda _: scene.post_new(error_stack=large), range(14)))

        with scene.locked("events"), persisting(post_many, 0.1):
            names = ("WaitingNearLimit", "LatencyHigh", "RequestsFailing")
            scene.prometheus.wait_for_alerts(names, note)


def provoke_dying_workers(scene: Scene, note: Note) -> None:
    """Kill each worker that comes."""

    def kill_worker() -> None:
        for worker in scene.service.find_workers():
            worker.kill()

    with persisting(kill_worker, 1.0):
        scene.prometheus.wait_for_alerts(["WorkersRestarting"], note)


def provoke_lost_database(scene: Scene, url: str, note: Note) -> None:
    """Refuse connections to the service's database, and end those that it has."""
    name = parse_dsn(scene.service.database_url)["dbname"]
    with closing(psycopg2.connect(url)) as admin, admin.cursor() as cursor:
        admin.autocommit = True
        cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
        cursor.execute(end, [name])
        try:
            scene.prometheus.wait_for_alerts(["DatabaseUnavailable"], note)
        finally:
            cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def provoke_failing_partitions(scene: Scene, note: Note) -> None:
    """Start a service that lacks a partition and cannot make it, for the table is in use."""
    with closing(psycopg2.connect(scene.service.database_url)) as holder:
        with holder, holder.cursor() as cursor:
            cursor.execute(f"DROP TABLE events_{datetime.now(UTC):%Y_%m}")
        holder.cursor().execute("LOCK TABLE events_default IN ACCESS SHARE MODE")
        with running_service(scene.service.settings) as other:
            scene.prometheus.watch(other)
            scene.prometheus.wait_for_alerts(["PartitionsFailing"], note)


def test_every_alert_fires_in_its_trouble_and_none_before(
    postgres_url: str,
    create_migrated: Callable[[], str],
    tmp_path: Path,
    record_testsuite_property: Note,
) -> None:
    """While all is well no panel is empty and no alert fires; in its trouble each of them does."""
    fired: dict[str, object] = {}

    def note(name: str, said: object) -> None:
        fired[name] = said
        record_testsuite_property(name, said)

    with opened_scene(create_migrated(), tmp_path) as scene:
        check_calm(scene)
        provoke_bad_events(scene, note)
        provoke_silence(scene, note)
        provoke_failing_providers(scene, note)
        provoke_waiting_requests(scene, note)
        provoke_dying_workers(scene, note)
        provoke_lost_database(scene, postgres_url, note)
        scene.service.stop()
        scene.prometheus.wait_for_alerts(["ServiceDown"], note)
        wait_for(lambda: scene.prometheus.find_receivers("ServiceDown"), ["at once"], PATIENCE)
        provoke_failing_partitions(scene, note)
    assert sorted(fired) == sorted(NAMES)
