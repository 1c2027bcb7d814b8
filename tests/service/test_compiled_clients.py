"""Clients in other languages, generated from protos/ with their usual tools, compile and work."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from platform import machine

import grpc_tools  # type: ignore[import-untyped]
import pytest
from google.protobuf.json_format import MessageToDict

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsRequest
from tests.support.projects import Project
from tests.support.services import ROOT, Service

SECONDS = 600
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"
PROTOC = (sys.executable, "-m", "grpc_tools.protoc")
PUBLIC = sorted(str(path.relative_to(ROOT / "protos")) for path in ROOT.glob("protos/*/v1/*.proto"))
GO_MODULES = {
    "google.golang.org/protobuf": "v1.36.12",
    "google.golang.org/grpc": "v1.85.0",
    "google.golang.org/grpc/cmd/protoc-gen-go-grpc": "v1.6.2",
}
GO = """
package main

import (
	"context"
	"fmt"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "client/productgraph/v1"
)

func main() {
	target, project, key := os.Args[1], os.Args[2], os.Args[3]
	insecurely := grpc.WithTransportCredentials(insecure.NewCredentials())
	connection, err := grpc.NewClient(target, insecurely)
	check(err)
	details, err := structpb.NewStruct(map[string]any{"plan": "pro"})
	check(err)
	event := &pb.Event{
		EventId:        "go-1",
		ProjectId:      project,
		SessionId:      "s",
		EventType:      "custom",
		EventTimestamp: timestamppb.Now(),
		PagePath:       proto.String("/"),
		Metadata:       details,
	}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "x-pg-api-key", key)
	request := &pb.IngestEventsRequest{Events: []*pb.Event{event}}
	answer, err := pb.NewEventIngestionServiceClient(connection).IngestEvents(ctx, request)
	check(err)
	text, err := protojson.Marshal(answer)
	check(err)
	fmt.Println(string(text))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
"""
JAVA = """
import com.google.protobuf.Struct;
import com.google.protobuf.Timestamp;
import com.google.protobuf.Value;
import com.productgraph.v1.Event;
import com.productgraph.v1.IngestEventsRequest;

public class Main {
  public static void main(String[] arguments) throws Exception {
    Struct details =
        Struct.newBuilder()
            .putFields("plan", Value.newBuilder().setStringValue("pro").build())
            .build();
    Event event =
        Event.newBuilder()
            .setEventId("java-1")
            .setProjectId(arguments[0])
            .setSessionId("s")
            .setEventType("custom")
            .setEventTimestamp(Timestamp.newBuilder().setSeconds(1764239400))
            .setPagePath("/")
            .setMetadata(details)
            .build();
    IngestEventsRequest.newBuilder().addEvents(event).build().writeTo(System.out);
  }
}
"""
POM = """
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>client</groupId>
  <artifactId>client</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>com.google.api.grpc</groupId>
      <artifactId>proto-google-common-protos</artifactId>
      <version>2.64.1</version>
    </dependency>
    <dependency>
      <groupId>com.google.protobuf</groupId>
      <artifactId>protobuf-java</artifactId>
      <version>VERSION</version>
    </dependency>
    <dependency>
      <groupId>com.google.protobuf</groupId>
      <artifactId>protoc</artifactId>
      <version>VERSION</version>
      <type>exe</type>
      <classifier>PLATFORM</classifier>
    </dependency>
  </dependencies>
</project>
"""
# Of Google's own types, the one in protos/ is for those languages alone that lack it.
STATUS = "google/rpc/status.proto"
NPM = {
    "@bufbuild/protobuf": "2.17.0",
    "@bufbuild/protoc-gen-es": "2.17.0",
    "@types/node": "20.19.0",
    "typescript": "5.9.3",
}
TYPESCRIPT = """
import { create, toJsonString } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { IngestEventsRequestSchema } from "./productgraph/v1/event_ingestion_service_pb";

const [url, projectId, key] = process.argv.slice(2);
const event = {
  eventId: "es-1",
  projectId,
  sessionId: "s",
  eventType: "custom",
  eventTimestamp: timestampFromDate(new Date()),
  pagePath: "/",
  metadata: { plan: "pro" },
};
const request = create(IngestEventsRequestSchema, { events: [event] });
fetch(`${url}/v1/events`, {
  method: "POST",
  headers: { "Content-Type": "application/json", "X-PG-API-Key": key },
  body: toJsonString(IngestEventsRequestSchema, request),
})
  .then((answer) => answer.text())
  .then(console.log);
"""

pytestmark = pytest.mark.slow


def need(*programs: str) -> None:
    """Skip the test unless the programs are installed."""
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


def run(place: Path, *command: str) -> bytes:
    """Return the output of a command, which must succeed."""
    done = subprocess.run(command, cwd=place, capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return done.stdout


def fetch(place: Path, *command: str) -> None:
    """Run what downloads a toolchain's packages; skip the test if it cannot."""
    done = subprocess.run(command, cwd=place, capture_output=True, timeout=SECONDS, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {(done.stdout + done.stderr).decode()[-500:]}")


def generate(
    place: Path,
    *options: str,
    protoc: tuple[str, ...] = PROTOC,
    others: tuple[str, ...] = (),
) -> None:
    """Generate code from the public protos, and from others."""
    paths = [f"--proto_path={place}" for place in (ROOT / "protos", WELL_KNOWN)]
    run(place, *protoc, *paths, *options, *PUBLIC, *others)


def build_go(place: Path, module: str, program: str) -> None:
    """Build a Go module with generated code, as a program of its name; skip the test without Go."""
    need("go")
    (place / "main.go").write_text(program)
    tools = {
        "protoc-gen-go": "google.golang.org/protobuf/cmd/protoc-gen-go",
        "protoc-gen-go-grpc": "google.golang.org/grpc/cmd/protoc-gen-go-grpc",
    }
    run(place, "go", "mod", "init", module)
    fetch(place, "go", "get", *(f"{name}@{version}" for name, version in GO_MODULES.items()))
    for name, package in tools.items():
        run(place, "go", "build", "-o", name, package)
    plugins = [f"--plugin={name}={place / name}" for name in tools]
    options = ["--go_out=.", "--go-grpc_out=."]
    options += ["--go_opt=paths=source_relative", "--go-grpc_opt=paths=source_relative"]
    generate(place, *plugins, *options)
    fetch(place, "go", "mod", "tidy")
    run(place, "go", "build", "-o", module, ".")


def test_go_client_sends_events(service: Service, project: Project, tmp_path: Path) -> None:
    """Code of protoc-gen-go and protoc-gen-go-grpc compiles and calls the service."""
    build_go(tmp_path, "client", GO)
    answer = run(tmp_path, "./client", service.grpc_target, project.id, project.key)
    assert json.loads(answer) == {"accepted": 1}


def test_generated_java_messages_compile(tmp_path: Path) -> None:
    """Java's code compiles, each class in a file of its own, and writes what Python reads."""
    need("mvn", "javac", "java")
    platform = f"linux-{machine().replace('aarch64', 'aarch_64')}"
    version = run(tmp_path, *PROTOC, "--version").decode().split()[-1]
    pom = POM.replace("VERSION", f"4.{version}").replace("PLATFORM", platform)
    (tmp_path / "pom.xml").write_text(pom)
    copy = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
    fetch(tmp_path, "mvn", "--batch-mode", "--quiet", copy, "-DoutputDirectory=jars")
    [compiler] = tmp_path.glob("jars/protoc-*.exe")
    compiler.chmod(0o755)
    sources = tmp_path / "sources"
    sources.mkdir()
    generate(tmp_path, f"--java_out={sources}", protoc=(str(compiler),))
    (sources / "Main.java").write_text(JAVA)
    assert (sources / "com/productgraph/v1/Event.java").exists()
    files = [str(path) for path in sources.rglob("*.java")]
    run(tmp_path, "javac", "-cp", "jars/*", "-d", "classes", *files)
    written = run(tmp_path, "java", "-cp", "classes:jars/*", "Main", "proj_java")
    [event] = IngestEventsRequest.FromString(written).events
    assert MessageToDict(event) == {
        "event_id": "java-1",
        "project_id": "proj_java",
        "session.id": "s",
        "event.type": "custom",
        "event.timestamp": "2025-11-27T10:30:00Z",
        "page.path": "/",
        "metadata": {"plan": "pro"},
    }


def test_protobuf_es_client_sends_events(
    service: Service, project: Project, tmp_path: Path
) -> None:
    """Code of @bufbuild/protoc-gen-es compiles, and its JSON is what the service takes."""
    need("npm", "node")
    (tmp_path / "package.json").write_text(json.dumps({"dependencies": NPM}))
    fetch(tmp_path, "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts")
    binaries = tmp_path / "node_modules/.bin"
    plugin = f"--plugin=protoc-gen-es={binaries / 'protoc-gen-es'}"
    generate(tmp_path, plugin, "--es_out=.", "--es_opt=target=ts", others=(STATUS,))
    (tmp_path / "main.ts").write_text(TYPESCRIPT)
    options = ["--strict", "--target", "es2022", "--module", "commonjs", "--outDir", "out"]
    run(tmp_path, str(binaries / "tsc"), *options, "main.ts")
    arguments = [service.http_url, project.id, project.key]
    answer = run(tmp_path, "node", "out/main.js", *arguments)
    assert json.loads(answer) == {"accepted": 1, "rejected": 0, "errors": []}
