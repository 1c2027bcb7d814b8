"""The bench measures; what it measures depends on the machine and is not asserted."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

from server.storage.connection import connected, open_engine
from server.storage.keys import create_key
from tests.bench.database import BenchDatabase, borrowed_database
from tests.bench.events import (
    TenantRequest,
    encode_http,
    encode_protobuf,
    make_events,
    make_long_events,
)
from tests.bench.filling import Filling, Limits
from tests.bench.growth_model import Inputs, calculate_need
from tests.bench.load import LoadPlan, run_load
from tests.bench.servers import running_baseline
from tests.support.database import Database
from tests.support.events import make_message
from tests.support.services import Service, run_program

LOADS = ("baseline-20-2", "http-20-2", "grpc-20-2")
_POSITIVE = (
    *("events_per_second", "requests_per_second", "p50_ms", "p99_ms", "peak_memory_mb"),
    *("ratio_to_copy", "ratio_to_baseline"),
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a short run of three loads has written."""
    directory = tmp_path_factory.mktemp("bench")
    chosen = [word for load in LOADS for word in ("--only", load)]
    words = ("--seconds=0.4", f"--output={directory}", *chosen)
    finished = run_program("tests.bench", *words, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return directory


@pytest.fixture(scope="module")
def document(output: Path) -> Any:
    """Its figures."""
    return json.loads((output / "bench.json").read_text())


@pytest.mark.slow
def test_every_chosen_load_is_measured_and_compared(document: Any) -> None:
    """Each load has speed, latency, memory and its ratios to COPY and to the baseline."""
    measured = document["measurements"]
    assert [figures["name"] for figures in measured] == list(LOADS)
    assert all(figures[name] > 0 for figures in measured for name in _POSITIVE)
    assert all(not figures["failures"] for figures in measured)
    assert all(speed > 0 for speed in document["copy"]["each_time"])


@pytest.mark.slow
def test_cpu_time_is_known_for_each_process(document: Any) -> None:
    """The CPU time of service, database and load generator is known for each load."""
    for figures in document["measurements"]:
        assert set(figures["cpu_us_per_event"]) == {"service", "database", "load_generator"}
        assert figures["cpu_us_per_event"]["load_generator"] > 0


@pytest.mark.slow
def test_every_worker_gets_its_share_of_connections(document: Any) -> None:
    """No load is measured on workers that are unequally busy."""
    shares = [figures["connections_per_worker"] for figures in document["measurements"]]
    assert shares == [[8, 8], [8, 8], [2, 2]]


@pytest.mark.slow
def test_figures_name_the_machine_they_come_from(document: Any) -> None:
    """Figures say where they come from."""
    assert document["machine"]["cores"] > 0
    assert document["machine"]["processor"]
    assert re.match(r"\d+\.\d+", document["postgresql"])


@pytest.mark.slow
def test_the_chart_has_a_bar_for_each_load(output: Path) -> None:
    """The SVG is well-formed, and has a bar for each load."""
    chart = ElementTree.parse(output / "bench.svg")
    labels = {element.text for element in chart.iter("{http://www.w3.org/2000/svg}text")}
    assert {"FastAPI, 2 workers", "HTTP, 2 workers", "gRPC, 2 workers"} <= labels


def test_refused_requests_are_recorded_and_not_counted_as_throughput(service: Service) -> None:
    """An answer other than success is written down with what it said, and is no throughput."""
    family = {"service": [service.process.pid]}
    workers = [worker.pid for worker in service.find_workers()]
    plan = LoadPlan("http", service.http_port, "no key", 1, 1, 1, 0.1, 0.1, 1, workers, family)
    result = json.loads(json.dumps(asdict(run_load(plan))))
    assert result["requests"] == 0
    assert all("missing or invalid API key" in answer for answer in result["failures"])
    assert sum(result["failures"].values()) > 0


@pytest.mark.slow
def test_forwarding_is_measured_without_losing_an_event(tmp_path: Path) -> None:
    """Each part of it has its figures, and loses no event."""
    words = ("--forwarding", "--share=0.01", f"--output={tmp_path}")
    finished = run_program("tests.bench", *words, timeout=1800)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    document = json.loads((tmp_path / "forwarding.json").read_text())
    assert document["cost"]["acknowledged"] == 7 * (20 + 2) + 7 * 5 * 20 + 20
    for part in ("cost", "hang"):
        figures = document[part]
        assert set(figures["arrived"].values()) == {figures["acknowledged"]}
        assert figures["pending"] == {"amplitude": 0, "mixpanel": 0}
    for each in document["cost"]["workloads"].values():
        assert all(ratio > 0 for ratio in each["p99_ratios"].values())
    assert document["hang"]["pending_after_the_hang"]["amplitude"] > 0
    assert document["backlog"]["drain"]["events_per_second"] > 0
    assert all(milliseconds > 0 for milliseconds in document["backlog"]["claim_ms"].values())


@pytest.mark.slow
def test_blocked_persons_and_redaction_are_measured_by_comparison(tmp_path: Path) -> None:
    """Each list and the redaction have their figures, with and without it."""
    finished = run_program(
        "tests.bench", "--privacy", "--share=0.1", f"--output={tmp_path}", timeout=1800
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    document = json.loads((tmp_path / "privacy.json").read_text())
    changes = ["no change", "0 blocked", "1 blocked", "100,000 blocked", "two fields redacted"]
    assert list(document) == changes
    for loads in document.values():
        assert list(loads) == ["http-50-1", "grpc-50-1"]
        for figures in loads.values():
            assert figures["speed_ratio"] > 0
            assert len(figures["rounds"]) == 3
            for side in ("without", "with"):
                assert all(value > 0 for value in figures[side].values())


@pytest.mark.slow
def test_growth_is_measured_in_each_size_without_losing_events(tmp_path: Path) -> None:
    """Each part has each of its sizes, all acknowledged events are stored, and idle ones stay."""
    words = ("--scale", "--quick", f"--output={tmp_path}")
    finished = run_program("tests.bench", *words, timeout=1800)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    document = json.loads((tmp_path / "scale.json").read_text())
    names = {part: [load["name"] for load in loads] for part, loads in document["parts"].items()}
    assert names == {
        "replicas": ["1 replica", "2 replicas"],
        "projects": ["1 project", "20 projects"],
        "keys": ["10 keys", "50 keys"],
        "connections": ["16 busy", "40 busy", "40 + 100 idle"],
        "table": ["empty table", "10,000 rows", "20,000 rows"],
    }
    for load in (load for loads in document["parts"].values() for load in loads):
        assert load["stored"] == load["acknowledged"] > 0
        assert not load["failures"]
    assert document["parts"]["connections"][-1]["idle_open"] == 100
    needs = document["model"]["needs"]
    assert [need["events_a_day"] for need in needs] == [10**9, 10**10, 10**11]
    for load in document["parts"]["table"][1:]:
        assert load["table_rows"] > load["rows"]
        assert 100 < load["table_bytes"] / load["table_rows"] < 2000
    chart = ElementTree.parse(tmp_path / "scale.svg")
    labels = {element.text for element in chart.iter("{http://www.w3.org/2000/svg}text")}
    assert {name for part in names.values() for name in part} <= labels


def test_a_database_with_events_is_refused_before_it_changes(
    create_database: Callable[[], str],
) -> None:
    """A database that has events, of whatever version, is left as it was."""
    database = Database(create_database())
    database.query("CREATE TABLE events AS SELECT 1 AS event_id")
    with pytest.raises(ValueError, match="has events"), borrowed_database(database.url):
        pass
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    assert database.query(tables) == [("events",)]


def test_a_bench_that_is_interrupted_leaves_no_event_and_key(
    create_migrated: Callable[[], str],
) -> None:
    """A named database has the keys that it had, and no events, however the bench ends."""
    database = Database(create_migrated())
    with connected(open_engine(database.url)) as connection:
        create_key(connection, "proj_bench", "bench")
    keys = "SELECT id FROM api_keys"
    before = database.query(keys)
    with suppress(KeyboardInterrupt), borrowed_database(database.url) as borrowed:
        borrowed.create_keys(["proj_bench"] * 3)
        database.query(f"INSERT INTO api_key_uses SELECT id, now(), now() FROM ({keys}) AS k")
        database.store([make_message("proj_demo", "evt_1")])
        raise KeyboardInterrupt
    assert database.query(keys) == before == database.query("SELECT key_id FROM api_key_uses")
    assert database.query("SELECT FROM events") == []


def test_rows_of_a_year_lie_in_partitions_of_their_months(
    create_migrated: Callable[[], str],
) -> None:
    """A table that is filled has its rows where one in production that is a year old has them."""
    database, now = Database(create_migrated()), datetime.now(UTC)
    bench = BenchDatabase(database.url)
    bench.prepare()
    filling = Filling(bench, [("proj_demo", "key")], now, lambda _: None)
    database.store([make_message("proj_demo", "evt_1", int(now.timestamp()))])
    assert filling.fill(Limits(1000, 2**30, 600.0)).table_rows == 1001
    found = database.query("SELECT DISTINCT tableoid::regclass::text FROM events")
    assert ("events_default",) not in found
    assert len(found) in (12, 13)


def test_projects_take_turns_in_a_request_of_the_load() -> None:
    """Each number has the project and the key whose turn it is, in all events and in the header."""
    tenants = [("proj_1", "key_a"), ("proj_2", "key_b")]
    request = TenantRequest(3, tenants)
    for number in range(4):
        request.number(number)
        head, _, body = bytes(request.buffer).partition(b"\r\n\r\n")
        project, key = tenants[number % 2]
        assert {event["project_id"] for event in json.loads(body)["events"]} == {project}
        assert f"X-PG-API-Key: {key}".encode() in head


def test_the_model_of_growth_multiplies_what_was_measured() -> None:
    """A day of 86.4 billion events is a million a second, twice that at the peak."""
    inputs = Inputs(20.0, 10.0, 500.0, vcpu_price=0.04, disk_price=0.1, peak=2.0, busy=0.5)
    need = calculate_need(inputs, 86_400_000_000)
    assert need.service_cores == pytest.approx(80)
    assert need.database_cores == pytest.approx(40)
    assert need.vcpu_hours_a_day == pytest.approx(2880)
    assert need.vcpu_cost_a_day == pytest.approx(115.2)
    assert need.gib_a_day == pytest.approx(86_400_000_000 * 500 / 2**30)
    assert need.disk_cost_a_month == pytest.approx(3 * need.gib_a_day)


def test_a_table_is_full_at_the_first_limit_that_it_reaches() -> None:
    """The next slice of a table must fit into half of the free disk, the rows and the time."""
    limits = Limits(rows=1000, size=2**30, seconds=60.0)
    assert limits.find_end(999, 2**29, 59.0, 2**29) is None
    assert "1,000 rows" in str(limits.find_end(1000, 2**29, 59.0, 2**29))
    assert "1.0 GiB" in str(limits.find_end(999, 2**29, 59.0, 2**29 + 1))
    assert "1 minutes" in str(limits.find_end(999, 2**29, 60.0, 2**29))
    assert Limits(None, 2**30, 60.0).find_end(10**9, 2**29, 1.0, 1) is None


@pytest.fixture(scope="module")
def baseline(create_migrated: Callable[[], str]) -> Iterator[tuple[int, str]]:
    """Provide the port of a running baseline, and an API key of the project that it takes."""
    database = BenchDatabase(create_migrated())
    with (
        connected(open_engine(database.url)) as connection,
        running_baseline(database, workers=1) as server,
    ):
        key = create_key(connection, "proj_demo", "baseline")
        connection.commit()
        yield server.ports["http"], key


@pytest.mark.slow
def test_baseline_answers_as_the_specification_says(baseline: tuple[int, str]) -> None:
    """Valid events are accepted, sent again too; a wrong one is rejected by itself."""
    port, key = baseline
    valid = {
        "event_id": "evt_001",
        "project_id": "proj_demo",
        "session.id": "sess_abc123",
        "event.type": "page.view",
        "event.timestamp": "2024-01-15T10:30:00Z",
        "api.duration_ms": 12.5,
        "org.id": "kept",
        "metadata": {"a": 1},
    }
    body = {"events": [valid, valid | {"event_id": ""}, valid]}
    for _ in range(2):
        assert _post(port, key, body) == (
            202,
            {
                "accepted": 2,
                "rejected": 1,
                "errors": [{"index": 1, "error": "event_id: required"}],
            },
        )
    assert _post(port, "unknown", body)[0] == 401
    assert _post(port, key, {"events": [valid] * 1001})[0] == 400


def _post(port: int, key: str, body: object) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", "X-PG-API-Key": key}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/events", json=body, headers=headers)
    return answer.status_code, answer.json()


def test_an_unknown_load_is_answered_with_known_ones() -> None:
    """A misspelt load ends the command with the names there are."""
    finished = run_program("tests.bench", "--only", "htp-1-1", timeout=300)
    assert finished.returncode == 2
    assert "http-1-1" in finished.stderr


def test_numbering_a_request_keeps_its_length() -> None:
    """A number gives all events of a request new ids, and changes its length never."""
    request = encode_http(make_events(3), "key")
    length = len(request.buffer)
    ids = set()
    for number in (7, 8, 0xFFFFFFFF):
        request.number(number)
        body = json.loads(bytes(request.buffer).partition(b"\r\n\r\n")[2])
        ids |= {event["event_id"] for event in body["events"]}
    assert len(ids) == 9
    assert len(request.buffer) == length


def test_generated_events_have_the_sizes_they_claim() -> None:
    """A usual event is about 600 bytes of JSON and 356 of protobuf; a long one fills 10 MB."""
    events = make_events(1000)
    assert len(encode_http(events, "key").buffer) / 1000 == pytest.approx(600, abs=30)
    assert len(encode_protobuf(events).buffer) / 1000 == pytest.approx(356, abs=15)
    assert 10_000_000 < len(encode_http(make_long_events(1000), "key").buffer) < 10_485_760
