"""The bench measures; what it measures depends on the machine and is not asserted."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

from server.storage.connection import connected, open_engine
from server.storage.keys import create_key
from tests.bench.database import BenchDatabase
from tests.bench.events import (
    encode_http,
    encode_protobuf,
    make_events,
    make_long_events,
)
from tests.bench.load import LoadPlan, run_load
from tests.bench.servers import running_baseline
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
    family = {"service": service.process.pid}
    workers = [worker.pid for worker in service.find_workers()]
    plan = LoadPlan("http", service.http_port, "no key", 1, 1, 1, 0.1, 0.1, 1, workers, family)
    result = json.loads(json.dumps(asdict(run_load(plan))))
    assert result["requests"] == 0
    assert all("missing or invalid API key" in answer for answer in result["failures"])
    assert sum(result["failures"].values()) > 0


@pytest.mark.slow
def test_forwarding_is_measured_without_losing_an_event(tmp_path: Path) -> None:
    """Each part of it has its figures, and loses no event."""
    words = ("--forwarding", "--scale=0.01", f"--output={tmp_path}")
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
        "tests.bench", "--privacy", "--scale=0.1", f"--output={tmp_path}", timeout=1800
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
