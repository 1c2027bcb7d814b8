"""Clients that others' tools generate from the description compile, and can send every field."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from server.events.schema import EVENT_SCHEMA, Field, Kind
from tests.support.clients import send
from tests.support.projects import Project
from tests.support.services import Service

pytestmark = pytest.mark.slow  # installs and runs the tools of others

PACKAGES = {
    "openapi-typescript": "7.13.0",
    "@openapitools/openapi-generator-cli": "2.41.0",
    "typescript": "5.9.3",
    "@types/node": "20.19.0",
}
GENERATOR = "7.23.0"
JAVA = "needs Java for openapi-generator (Debian: default-jre-headless)"
INSTALL_SECONDS = 300
pytestmark = pytest.mark.slow
BUILT_IN = re.compile(r"schemas/(Error|Event|Map|Set|Date|Object|Array|Symbol|Record|Promise)\b")

# The program of a user of openapi-typescript.
TYPES_PROGRAM = """
import type { components, operations } from "./api";

type Batch = operations["ingestEvents"]["requestBody"]["content"]["application/json"];
type Result = operations["ingestEvents"]["responses"][202]["content"]["application/json"];

const event: components["schemas"]["TelemetryEvent"] = EVENT;
const batch: Batch = { events: [event] };
fetch(`${process.argv[2]}/v1/events`, {
  method: "POST",
  headers: { "Content-Type": "application/json", "X-PG-API-Key": process.argv[3] },
  body: JSON.stringify(batch),
})
  .then((answer) => answer.json())
  .then((result: Result) => console.log(JSON.stringify(result)));
"""
# The program of a user of openapi-generator.
CLIENT_PROGRAM = """
import { Configuration, DefaultApi, TelemetryEvent } from "./client/index";

const event: TelemetryEvent = EVENT;
const [basePath, apiKey] = process.argv.slice(2);
const api = new DefaultApi(new Configuration({ basePath, apiKey }));
api
  .ingestEvents({ eventBatch: { events: [event] } })
  .then((result) => console.log(JSON.stringify(result)));
"""


@pytest.fixture(scope="module")
def tools(pytestconfig: pytest.Config) -> Path:
    """Return a directory with the tools, which later runs find again; skip if they are missing."""
    if not (npm := shutil.which("npm")):
        pytest.skip("npm is not installed")
    directory = pytestconfig.cache.mkdir("openapi-clients")
    package = json.dumps({"dependencies": PACKAGES})
    if (installed := directory / "installed").exists() and installed.read_text() == package:
        return directory
    (directory / "package.json").write_text(package)
    version = {"version": GENERATOR, "storageDir": str(directory / "generator")}
    (directory / "openapitools.json").write_text(json.dumps({"generator-cli": version}))
    done = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"npm cannot install the tools: {done.stderr[-500:]}")
    installed.write_text(package)
    return directory


@pytest.fixture
def place(tools: Path, service: Service, tmp_path: Path) -> Path:
    """Return a directory for a program, with the tools and the description."""
    (tmp_path / "node_modules").symlink_to(tools / "node_modules")
    shutil.copy(tools / "openapitools.json", tmp_path)
    (tmp_path / "api.json").write_text(json.dumps(send(service, "GET", "/openapi.json").json))
    return tmp_path


def run(place: Path, *command: str) -> str:
    """Return the output of a command, which must succeed."""
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_value(field: Field, project: Project) -> Any:
    """Return a value of a field."""
    if field.rules.matches_api_key:
        return project.id
    if field.rules.allowed_values:
        return field.rules.allowed_values[0]
    return {
        Kind.TEXT: "text",
        Kind.TIMESTAMP: "2026-11-27T10:30:00.000Z",
        Kind.OBJECT: {"plan": "pro", "deep": [{"a": 1}, None, "text", True]},
        Kind.INTEGER: 200,
        Kind.LONG: 12,
    }[field.kind]


def write_program(place: Path, program: str, event: str) -> None:
    """Write the program and compile it, together with what it imports."""
    (place / "main.ts").write_text(program.replace("EVENT", event, 1))
    options = ["--strict", "--target", "es2022", "--module", "commonjs", "--outDir", "out"]
    run(place, "node_modules/.bin/tsc", *options, "main.ts")


def test_no_schema_has_the_name_of_a_built_in(service: Service) -> None:
    """Generated clients import our types without hiding what JavaScript or browsers define."""
    assert not BUILT_IN.search(json.dumps(send(service, "GET", "/openapi.json").json))


def test_every_operation_has_an_id(service: Service) -> None:
    """Clients name their functions by it."""
    paths = send(service, "GET", "/openapi.json").json["paths"]
    found = [operation.get("operationId") for path in paths.values() for operation in path.values()]
    assert found == ["ingestEvents", "checkHealth", "checkReadiness", "describeApi"]


def test_openapi_typescript_sends_every_field(
    place: Path, service: Service, project: Project
) -> None:
    """A program with its types compiles, with every field and unnamed ones, and is accepted."""
    run(place, "node_modules/.bin/openapi-typescript", "api.json", "--output", "api.ts")
    event = {field.wire_name: make_value(field, project) for field in EVENT_SCHEMA.fields}
    event |= {"org.id": "acme", "performance.lcp_ms": 12.5}
    write_program(place, TYPES_PROGRAM, json.dumps(event))
    result = run(place, "node", "out/main.js", service.http_url, project.key)
    assert json.loads(result) == {"accepted": 1, "rejected": 0, "errors": []}


def test_openapi_generator_client_sends_every_field(
    place: Path, service: Service, project: Project
) -> None:
    """Its TypeScript client compiles, sends every field, and is accepted."""
    if not shutil.which("java"):
        pytest.skip(JAVA)
    generate = ["generate", "-i", "api.json", "-g", "typescript-fetch", "-o", "client"]
    run(place, "node_modules/.bin/openapi-generator-cli", *generate)
    values = [
        f"{name_in_client(field)}: {spell_for_client(field, project)}"
        for field in EVENT_SCHEMA.fields
    ]
    write_program(place, CLIENT_PROGRAM, f"{{ {', '.join(values)} }}")
    result = run(place, "node", "out/main.js", service.http_url, project.key)
    assert json.loads(result) == {"accepted": 1, "rejected": 0, "errors": []}


def name_in_client(field: Field) -> str:
    """Return the generated client's name of a field: `ui.element.text` is `uiElementText`."""
    first, *others = re.split(r"[._]", field.wire_name)
    return first + "".join(other.capitalize() for other in others)


def spell_for_client(field: Field, project: Project) -> str:
    """Return a value of a field in TypeScript."""
    value = json.dumps(make_value(field, project))
    return f"new Date({value})" if field.kind is Kind.TIMESTAMP else value
