"""The distribution in gen/ is all that a Python client needs, and the service's is beside it."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from tests.support.projects import Project
from tests.support.services import ROOT, Service

# The oldest runtime that gen/pyproject.toml allows, the last of its major version, and the newest.
RUNTIMES = {
    "lowest": ["protobuf==LOWEST", "grpcio==LOWEST"],
    "protobuf 6": ["protobuf<7"],
    "protobuf 7": ["protobuf>=7"],
}
# What pip may install for a client; grpcio needs the last one.
EXPECTED = {"productgraph-events", "protobuf", "grpcio", "googleapis-common-protos"}
ALLOWED = EXPECTED | {"pip", "setuptools", "typing-extensions"}
CLIENT = """
import json, sys
import grpc
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2
from productgraph.v1.event_ingestion_service_pb2 import IngestEventsRequest
from productgraph.v1.event_ingestion_service_pb2_grpc import EventIngestionServiceStub
from productgraph.v1.event_pb2 import Event

target, project, key = sys.argv[1:]
event = Event(event_id="1", project_id=project, session_id="s", event_type="custom")
event.event_timestamp.GetCurrentTime()
event.metadata.update({"plan": "pro"})
with grpc.insecure_channel(target) as channel:
    answer = EventIngestionServiceStub(channel).IngestEvents(
        IngestEventsRequest(events=[event, Event()]), metadata=[("x-pg-api-key", key)], timeout=60
    )
print(json.dumps(MessageToDict(answer)))
"""


def read_project(root: Path) -> dict[str, Any]:
    """Return the table `project` of a pyproject.toml."""
    project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return project


def build_wheel(source: Path, directory: Path) -> set[str]:
    """Return the files in the wheel of a source, which is left as it is."""
    copy = directory / "source"
    # Other processes may just be writing to some of these.
    unwanted = (".*", "__pycache__", "build", "*.egg-info", "node_modules", "data")
    ignored = shutil.ignore_patterns(*unwanted)
    shutil.copytree(source, copy, ignore=ignored)
    build = ["wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run(
        [sys.executable, "-m", "pip", *build, directory, copy], check=True, capture_output=True
    )
    [wheel] = directory.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    return {name for name in names if ".dist-info/" not in name}


def test_no_file_is_in_two_wheels(tmp_path: Path) -> None:
    """The client's wheel has the public generated code alone, the service's has the rest."""
    client = build_wheel(ROOT / "gen", tmp_path / "client")
    service = build_wheel(ROOT, tmp_path / "service")
    assert {name.partition("/")[0] for name in client} == {"productgraph"}
    assert {name.partition("/")[0] for name in service} == {"server"}
    assert "productgraph/py.typed" in client
    assert {name.rpartition("/")[2] for name in client if name.endswith(".pyi")} == {
        path.name for path in (ROOT / "gen/productgraph/v1").glob("*.pyi")
    }
    assert not any("encoded_events" in name for name in client)
    assert "server/events/encoded_events_pb2.py" in service


def test_both_distributions_have_one_version() -> None:
    """What is released together has the same version."""
    assert read_project(ROOT / "gen")["version"] == read_project(ROOT)["version"]


def test_no_index_is_asked_for_a_package_of_ours() -> None:
    """No requirement names a distribution of ours: somebody else's of that name could be taken."""
    project = read_project(ROOT)
    required = [*project["dependencies"], *read_project(ROOT / "gen")["dependencies"]]
    required += [each for extra in project["optional-dependencies"].values() for each in extra]
    assert not [each for each in required if each.startswith("productgraph")]
    constraints = (ROOT / "scripts/constraints.txt").read_text()
    assert not re.search("^productgraph", constraints, re.MULTILINE)
    for named in re.findall(r"pip install[^\n`]*", (ROOT / "OPERATIONS.md").read_text()):
        assert "productgraph" not in named
    [last] = re.findall(r"pip --python.*?\n\n", (ROOT / "Dockerfile").read_text(), re.DOTALL)
    assert "--no-index" in last


def test_generated_code_is_that_of_the_lowest_runtime() -> None:
    """What gen/pyproject.toml promises to run with is what the code was generated for."""
    lowest = find_lowest()
    messages = (ROOT / "gen/productgraph/v1/event_pb2.py").read_text()
    assert f"# Protobuf Python Version: {lowest['protobuf']}\n" in messages
    stub = (ROOT / "gen/productgraph/v1/event_ingestion_service_pb2_grpc.py").read_text()
    assert f"GRPC_GENERATED_VERSION = '{lowest['grpcio']}'" in stub


def find_lowest() -> dict[str, str]:
    """Return the lowest version of each package that gen/pyproject.toml allows."""
    required = read_project(ROOT / "gen")["dependencies"]
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+),.*", each).groups() for each in required)  # type: ignore[union-attr,misc]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_client_needs_four_packages(
    runtime: str, service: Service, project: Project, tmp_path: Path
) -> None:
    """A fresh environment with gen/ alone sends events, on protobuf 6 and 7, without a warning."""
    python = tmp_path / "environment/bin/python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    shutil.copytree(ROOT / "gen", tmp_path / "gen")
    lowest = find_lowest()
    versions = [
        each.replace("LOWEST", lowest[each.partition("==")[0]]) if "LOWEST" in each else each
        for each in RUNTIMES[runtime]
    ]
    install = [str(python), "-m", "pip", "install", "--quiet", "--prefer-binary"]
    done = subprocess.run(
        [*install, tmp_path / "gen", *versions], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip cannot install the packages: {done.stderr[-500:]}")
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True
    )
    packages = {package["name"].replace("_", "-") for package in json.loads(listed.stdout)}
    assert packages - ALLOWED == set()
    assert packages >= EXPECTED
    sent = subprocess.run(
        [python, "-W", "error", "-c", CLIENT, service.grpc_target, project.id, project.key],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (sent.returncode, sent.stderr) == (0, "")
    answer = json.loads(sent.stdout)
    assert (answer["accepted"], answer["rejected"]) == (1, 1)
    assert answer["errors"] == [{"index": 1, "error": "event_id: required"}]
