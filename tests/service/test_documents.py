"""The documents: their commands run as printed, their tables and links agree with the code."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from productgraph.v1 import rules_pb2
from productgraph.v1.event_pb2 import Event
from server.cli.config import describe_settings
from server.events.schema import EVENT_SCHEMA, Kind
from tests.service.test_commands import run_in_shell, translate_grpcurl
from tests.support.services import ROOT, Service, clean_environment, running_service

DOCUMENTS = [
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts)
]
TYPES = {
    Kind.TEXT: "string",
    Kind.INTEGER: "int32",
    Kind.LONG: "int64",
    Kind.TIMESTAMP: "timestamp",
    Kind.OBJECT: "object",
}


def read_section(document: str, heading: str) -> str:
    """Return what stands below a heading, up to the next one."""
    _, _, rest = (ROOT / document).read_text().partition(f"\n## {heading}\n")
    assert rest, f"{document} has no section {heading}"
    return re.split(r"^## ", rest, flags=re.MULTILINE)[0]


def read_commands(section: str) -> list[str]:
    """Return the indented blocks of a section."""
    blocks = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks]


def read_rows(section: str) -> list[list[str]]:
    """Return the rows of a section's first table, without its head."""
    table = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)
    assert table
    return [re.split(r" *\| *", line)[1:-1] for line in table[0].splitlines()[2:]]


@pytest.fixture(scope="module")
def started(open_directory: Path) -> Iterator[Service]:
    """Provide a service on a data directory of its own, as `scripts/serve` starts it.

    The scripts first bring their environment up to date, and say so, if it was made before a change
    of what it depends on.
    """
    script = ROOT / "scripts/productgraph"
    subprocess.run([script, "--help"], check=True, capture_output=True, env=clean_environment({}))
    with running_service({"DATA_DIR": str(open_directory / "documents")}) as service:
        yield service


def run_block(block: str, service: Service) -> str:
    """Run a block as it stands, but for the ports, with the service's data directory."""
    block = block.replace("localhost:8080", f"localhost:{service.http_port}")
    block = block.replace("localhost:50051", service.grpc_target)
    environment = shlex.join(f"{name}={value}" for name, value in service.settings.items())
    return run_in_shell(f"cd {shlex.quote(str(ROOT))} && export {environment}\n{block}")


def test_the_first_commands_of_the_readme_work_as_printed(started: Service) -> None:
    """They make a key and store an event, and the service answers what is printed below them."""
    commands, answer, tail = read_commands(read_section("README.md", "Send an event"))
    printed = run_block(commands, started)
    assert printed.startswith("HTTP/1.1 202")
    assert printed.splitlines()[-1] == answer.strip()
    assert "proj_demo  page.view  evt_1" in run_block(tail, started)


def run_grpcurl(started: Service, old: str = "", new: str = "") -> object:
    """Return what the grpcurl command of the API prints, with a text in it changed to another."""
    commands, *_ = read_commands(read_section("README.md", "Send an event"))
    make_key = commands.splitlines()[0]
    grpcurl, *_ = read_commands(read_section("protos/README.md", "gRPC"))
    command = translate_grpcurl(grpcurl.replace("\\\n", ""))
    assert old in command
    command = command.replace(old, new) if old else command
    return json.loads(run_block(f"{make_key}\n{command}", started))


def test_the_grpcurl_command_of_the_api_works_as_printed(started: Service) -> None:
    """It stores an event with the key that the README's first command makes."""
    assert run_grpcurl(started) == {"accepted": 1, "rejected": 0, "errors": []}


def test_the_grpcurl_command_shows_that_event_0_is_rejected(started: Service) -> None:
    """Zeros are printed, so that the answer is the documented one."""
    rejected = [{"index": 0, "error": "session.id: required"}]
    expected = {"accepted": 0, "rejected": 1, "errors": rejected}
    assert run_grpcurl(started, '"sess_1"', '""') == expected


def test_the_page_shows_the_client_that_browsers_were_tested_with() -> None:
    """What people paste from the API's document is what the tests in Chromium run."""
    section = read_section("protos/README.md", "From a browser")
    [shown] = re.findall(r"^```js\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert shown == (ROOT / "tests/browser/client.js").read_text()


def test_productgraph_runs_from_any_directory(started: Service, tmp_path: Path) -> None:
    """`scripts/productgraph` finds the service's data wherever it is called."""
    done = subprocess.run(
        [ROOT / "scripts/productgraph", "keys", "list"],
        cwd=tmp_path,
        env=clean_environment(started.settings),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "proj_demo" in done.stdout


def test_the_readme_is_short() -> None:
    """A page that everybody reads has at most 120 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def find_anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    """Every relative link names a file of the repository, and a heading that it has."""
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(document.parent / path)) if path else document
        assert target.exists(), link
        assert not anchor or anchor in find_anchors(target), link


def test_the_table_of_fields_agrees_with_the_schema() -> None:
    """The API's table has every field in order, with its type and its rules."""
    rows = read_rows(read_section("protos/README.md", "An event"))
    assert [row[0].strip("`") for row in rows] == [f.wire_name for f in EVENT_SCHEMA.fields]
    for (_, kind, meaning), field in zip(rows, EVENT_SCHEMA.fields, strict=True):
        required = ", required" if field.rules.required else ""
        assert kind == f"{TYPES[field.kind]}{required}"
        longest = re.search(r"at most (\d+) bytes", meaning)
        assert (int(longest[1]) if longest else 0) == field.rules.max_bytes, field.wire_name


def test_the_table_of_event_types_agrees_with_the_schema() -> None:
    """The API's table has every type that an event may have."""
    rows = read_rows(read_section("protos/README.md", "Event types"))
    rules = Event.DESCRIPTOR.fields_by_name["event_type"].GetOptions()
    allowed = rules.Extensions[rules_pb2.field_rules].allowed_values
    assert [row[0].strip("`") for row in rows] == list(allowed)


def test_the_table_of_settings_is_that_of_their_declarations() -> None:
    """OPERATIONS.md has what `productgraph config --table` prints."""
    assert describe_settings() in read_section("OPERATIONS.md", "Settings")
