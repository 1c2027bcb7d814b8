"""The programs of protos/README.md run as they stand, and come again after a refusal."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from platform import machine

import pytest

from tests.service.test_compiled_clients import (
    PROTOC,
    build_go,
    fetch,
    generate,
    need,
    run,
)
from tests.service.test_rate_limits import limited
from tests.support.clients import Tenant, accepted
from tests.support.services import ROOT, clean_environment, wait_until

DOCUMENT = ROOT / "protos/README.md"
SECONDS = 120
GOOGLE = ("google/rpc/error_details.proto", "google/rpc/status.proto")
NPM = {
    "@bufbuild/protobuf": "2.17.0",
    "@bufbuild/protoc-gen-es": "2.17.0",
    "@connectrpc/connect": "2.3.0",
    "@connectrpc/connect-node": "2.3.0",
}
GRPC_JAVA = "1.85.1"
DEPENDENCY = """
    <dependency>
      <groupId>{group}</groupId>
      <artifactId>{name}</artifactId>
      <version>{version}</version>
      {more}
    </dependency>"""
POM = """
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>sender</groupId>
  <artifactId>sender</artifactId>
  <version>1</version>
  <dependencies>{dependencies}
  </dependencies>
</project>
"""

slow = pytest.mark.slow


def read_recipe(heading: str) -> str:
    """Return the program below a heading of the document."""
    _, _, rest = DOCUMENT.read_text().partition(f"\n### {heading}\n")
    found = re.search(r"^```\w+\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)
    assert found, f"no program for {heading}"
    return found[1]


def place_recipe(heading: str, tenant: Tenant) -> str:
    """Return the same, for a tenant and its service."""
    service, recipe = tenant.service, read_recipe(heading)
    return (
        recipe.replace("localhost:8080", f"127.0.0.1:{service.http_port}")
        .replace("localhost:50051", service.grpc_target)
        .replace("proj_demo", tenant.project.id)
    )


def check(tenant: Tenant, event_id: str, start: Callable[[str], "subprocess.Popen[bytes]"]) -> None:
    """Fail unless a program, given a key, is refused by its rate first, and then sends its event.

    The rate is exhausted for some seconds when the program starts.
    """
    slow_one = limited(tenant, event_rate=20)
    assert slow_one.post_events(slow_one.make_events(400)) == accepted(400)
    size = tenant.service.log.stat().st_size
    process = start(slow_one.project.key)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors.decode()
    assert re.search(rb"(?<!\d)1(?!\d)", output), output
    assert event_id in {row["event_id"] for row in tenant.read_rows()}

    def find_statuses() -> list[object]:
        written, _, _ = tenant.service.log.read_bytes()[size:].rpartition(b"\n")
        records = [json.loads(line) for line in written.splitlines()]
        return [line["status"] for line in records if line.get("project") == tenant.project.id]

    wait_until(lambda: set(find_statuses()) & {202, "OK"})
    assert set(find_statuses()) & {429, "RESOURCE_EXHAUSTED"}


def starter(place: Path, *command: str) -> Callable[[str], "subprocess.Popen[bytes]"]:
    """Return what starts a command with a key."""

    def start(key: str) -> "subprocess.Popen[bytes]":
        environment = clean_environment({"KEY": key, "PYTHONPATH": str(ROOT / "gen")})
        return subprocess.Popen(
            command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


@slow
def test_the_curl_recipe_sends_its_event(tenant: Tenant, tmp_path: Path) -> None:
    """Curl comes again as late as Retry-After says."""
    need("curl")
    check(tenant, "evt_curl", starter(tmp_path, "sh", "-c", place_recipe("curl", tenant)))


@slow
def test_the_python_recipe_sends_its_event(tenant: Tenant, tmp_path: Path) -> None:
    """The stub's program reads RetryInfo from the trailers."""
    (tmp_path / "sender.py").write_text(place_recipe("Python", tenant))
    check(tenant, "evt_python", starter(tmp_path, sys.executable, "-W", "error", "sender.py"))


@slow
def test_the_go_recipe_sends_its_event(tenant: Tenant, tmp_path: Path) -> None:
    """The program compiles with generated code, and reads RetryInfo from the status."""
    build_go(tmp_path, "sender", place_recipe("Go", tenant))
    check(tenant, "evt_go", starter(tmp_path, "./sender"))


@slow
def test_the_fetch_recipe_sends_its_event(tenant: Tenant, tmp_path: Path) -> None:
    """Node's own fetch is enough."""
    need("node")
    (tmp_path / "sender.js").write_text(place_recipe("Node, with fetch", tenant))
    check(tenant, "evt_fetch", starter(tmp_path, "node", "sender.js"))


@slow
def test_the_connect_recipe_sends_its_event(tenant: Tenant, tmp_path: Path) -> None:
    """Connect speaks gRPC with code of protoc-gen-es, and finds RetryInfo among the details."""
    need("npm", "node")
    package = {"type": "module", "dependencies": NPM}
    (tmp_path / "package.json").write_text(json.dumps(package))
    fetch(tmp_path, "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts")
    plugin = f"--plugin=protoc-gen-es={tmp_path / 'node_modules/.bin/protoc-gen-es'}"
    generate(
        tmp_path, plugin, "--es_out=.", "--es_opt=target=js,import_extension=js", others=GOOGLE
    )
    (tmp_path / "sender.mjs").write_text(place_recipe("Node, with Connect", tenant))
    check(tenant, "evt_connect", starter(tmp_path, "node", "sender.mjs"))


def write_pom(place: Path) -> None:
    """Write what the Java recipe depends on, and the compilers of its code."""
    platform = f"linux-{machine().replace('aarch64', 'aarch_64')}"
    program = f"<type>exe</type><classifier>{platform}</classifier>"
    protobuf = f"4.{run(place, *PROTOC, '--version').decode().split()[-1]}"
    wanted = [
        *(("io.grpc", f"grpc-{name}", GRPC_JAVA, "") for name in ("netty-shaded", "protobuf")),
        ("io.grpc", "grpc-stub", GRPC_JAVA, ""),
        ("io.grpc", "protoc-gen-grpc-java", GRPC_JAVA, program),
        ("com.google.protobuf", "protobuf-java", protobuf, ""),
        ("com.google.protobuf", "protoc", protobuf, program),
    ]
    dependencies = "".join(
        DEPENDENCY.format(group=group, name=name, version=version, more=more)
        for group, name, version, more in wanted
    )
    (place / "pom.xml").write_text(POM.format(dependencies=dependencies))


@slow
def test_the_java_recipe_sends_its_event(tenant: Tenant, tmp_path: Path) -> None:
    """The program compiles with generated code, and reads RetryInfo from the exception."""
    need("mvn", "javac", "java")
    write_pom(tmp_path)
    copy = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
    fetch(tmp_path, "mvn", "--batch-mode", "--quiet", copy, "-DoutputDirectory=jars")
    for program in tmp_path.glob("jars/*.exe"):
        program.chmod(0o755)
    [protoc], [plugin] = (
        tmp_path.glob(f"jars/{name}-[0-9]*.exe") for name in ("protoc", "protoc-gen-grpc-java")
    )
    sources = tmp_path / "sources"
    sources.mkdir()
    options = [f"--java_out={sources}", f"--grpc-java_out=@generated=omit:{sources}"]
    generate(tmp_path, f"--plugin=protoc-gen-grpc-java={plugin}", *options, protoc=(str(protoc),))
    (sources / "Sender.java").write_text(place_recipe("Java", tenant))
    files = [str(path) for path in sources.rglob("*.java")]
    run(tmp_path, "javac", "-cp", "jars/*", "-d", "classes", *files)
    check(tenant, "evt_java", starter(tmp_path, "java", "-cp", "classes:jars/*", "Sender"))


@pytest.mark.parametrize(
    "heading", ["curl", "Python", "Go", "Node, with fetch", "Node, with Connect", "Java"]
)
def test_every_recipe_retries_and_names_what_was_rejected(heading: str) -> None:
    """No recipe stops at a refusal or reads the status alone."""
    recipe = read_recipe(heading)
    assert re.search(r"Retry-?(Info|After)|--retry", recipe)
    assert heading == "curl" or re.search(r"errors|Errors", recipe)
    assert "proj_demo" in recipe
