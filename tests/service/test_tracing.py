"""Traces of a real service, as a collector gets them."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.support.clients import bind_ingest, encode_request, frame, send
from tests.support.events import make_event
from tests.support.projects import Project, create_project
from tests.support.provider_servers import AmplitudeServer, Reply, Script
from tests.support.services import Service, clean_environment, running_service, wait_until

SECRET = "amplitude-secret"
# Only what a worker sends when it ends can arrive within a test.
UNHURRIED = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01", f"00-{'a' * 32}-{PARENT_ID}-00"


@dataclass(frozen=True)
class Span:
    """One span, and what made it."""

    message: SpanMessage
    resource: Mapping[str, object]

    @property
    def name(self) -> str:
        """What it is of."""
        return self.message.name

    @property
    def attributes(self) -> Mapping[str, object]:
        """Its attributes by their names."""
        return read_attributes(self.message.attributes)

    @property
    def request_id(self) -> object:
        """The request that it is of; None where it says nothing of that."""
        return self.attributes.get("productgraph.request.id")

    @property
    def duration(self) -> tuple[int, int]:
        """Its start and end, in nanoseconds."""
        return self.message.start_time_unix_nano, self.message.end_time_unix_nano


def read_attributes(pairs: Iterable[KeyValue]) -> dict[str, object]:
    """Attributes by their names."""
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in pairs}


class Collector:
    """An HTTP server that keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    resource = read_attributes(group.resource.attributes)
                    for scope in group.scope_spans:
                        spans.extend(Span(span, resource) for span in scope.spans)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.settings = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}"
        }

    @contextmanager
    def running(self) -> Iterator["Collector"]:
        """Take spans while the context lasts."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


def post(service: Service, project: Project, request_id: str, **headers: str) -> int:
    """Return the status of a request over HTTP with one event."""
    body = json.dumps({"events": [make_event(project.id)]}).encode()
    usual = {
        "content_type": "application/json",
        "x_pg_api_key": project.key,
        "x_request_id": request_id,
    }
    return send(service, "POST", "/v1/events", body, **usual | headers).status


def send_everything(service: Service, project: Project) -> None:
    """Return a request of each kind, under the id that it is found by."""
    assert post(service, project, "of-http", traceparent=SAMPLED) == 202
    metadata = (
        ("x-pg-api-key", project.key),
        ("x-request-id", "of-grpc"),
        ("traceparent", SAMPLED),
    )
    with grpc.insecure_channel(service.grpc_target) as channel:
        ingest = bind_ingest(channel)
        ingest(encode_request([frame(1, b"e1"), b"\xff"]), metadata=metadata, timeout=10)
    assert post(service, project, "unsampled", traceparent=UNSAMPLED) == 202
    assert post(service, project, "malformed-parent", traceparent="00-0-0-01") == 202
    assert post(service, project, "refused", x_pg_api_key="wrong") == 401


@pytest.fixture(scope="module")
def traced(create_migrated: Callable[[], str]) -> Iterator[tuple[list[Span], Project]]:
    """Provide what a service that forwards has sent to a collector by its end."""
    with (
        Collector().running() as collector,
        AmplitudeServer(SECRET) as provider,
        running_service(
            {
                "DATABASE_URL": create_migrated(),
                "ANALYTICS_ENABLED": "true",
                "AMPLITUDE_ENABLED": "true",
                "AMPLITUDE_API_KEY": SECRET,
                "AMPLITUDE_ENDPOINT": provider.url,
            }
            | collector.settings
            | UNHURRIED
        ) as service,
    ):
        project = create_project(service)
        provider.scripts.append(Script(Reply(503, b"")))
        send_everything(service, project)
        wait_until(lambda: len(provider.insert_ids) == 3)
        assert not collector.spans
        assert service.stop() == 0
        yield list(collector.spans), project


@pytest.fixture
def spans(traced: tuple[list[Span], Project]) -> list[Span]:
    """All that the collector got."""
    return traced[0]


def find(spans: list[Span], request_id: str) -> Span:
    """Return the span of a request."""
    [span] = [span for span in spans if span.request_id == request_id]
    return span


def find_children(spans: list[Span], parent: Span) -> list[Span]:
    """Return the spans beneath another, in the order of their beginning."""
    found = [span for span in spans if span.message.parent_span_id == parent.message.span_id]
    return sorted(found, key=lambda span: span.duration)


@pytest.mark.parametrize(
    ("request_id", "name", "attributes"),
    [
        (
            "of-http",
            "POST /v1/events",
            {
                "http.request.method": "POST",
                "http.response.status_code": 202,
                "http.route": "/v1/events",
                "productgraph.events.accepted": 1,
                "productgraph.events.rejected": 0,
                "url.path": "/v1/events",
                "url.scheme": "http",
            },
        ),
        (
            "of-grpc",
            "productgraph.v1.EventIngestionService/IngestEvents",
            {
                "productgraph.events.accepted": 0,
                "productgraph.events.rejected": 2,
                "rpc.method": "productgraph.v1.EventIngestionService/IngestEvents",
                "rpc.response.status_code": "OK",
                "rpc.system.name": "grpc",
            },
        ),
    ],
)
def test_a_request_span_continues_its_clients_trace(
    request_id: str,
    name: str,
    attributes: dict[str, object],
    traced: tuple[list[Span], Project],
) -> None:
    """A request's span continues its client's trace, and says what the conventions ask for."""
    spans, project = traced
    span = find(spans, request_id)
    assert (span.name, span.message.kind) == (name, SpanMessage.SPAN_KIND_SERVER)
    assert span.message.trace_id.hex() == TRACE_ID
    assert span.message.parent_span_id.hex() == PARENT_ID
    told = dict(span.attributes)
    size = told.pop("productgraph.request.bytes")
    assert isinstance(size, int)
    assert size > 0
    assert told == attributes | {
        "productgraph.request.id": request_id,
        "productgraph.project.id": project.id,
    }
    assert span.resource["service.name"] == "productgraph-ingestion"


@pytest.mark.parametrize("request_id", ["of-http", "of-grpc"])
def test_decoding_and_storing_are_spans_in_sequence(request_id: str, spans: list[Span]) -> None:
    """Decoding and storing follow each other within their request."""
    parent = find(spans, request_id)
    decode, store = find_children(spans, parent)
    assert (decode.name, store.name) == ("decode", "store")
    assert {decode.message.trace_id, store.message.trace_id} == {parent.message.trace_id}
    marks = (*parent.duration[:1], *decode.duration, *store.duration, *parent.duration[1:])
    assert list(marks) == sorted(marks)
    assert decode.duration[0] < decode.duration[1] == store.duration[0]
    assert store.duration[1] == parent.duration[1]


def test_an_unsampled_client_trace_is_not_recorded(spans: list[Span]) -> None:
    """What a client does not sample is not traced here either."""
    assert not [span for span in spans if span.request_id == "unsampled"]
    assert not [span for span in spans if span.message.trace_id.hex() == "a" * 32]


def test_a_malformed_traceparent_begins_a_new_trace(spans: list[Span]) -> None:
    """A traceparent in another form begins a trace of its own."""
    span = find(spans, "malformed-parent")
    assert not span.message.parent_span_id
    assert len(find_children(spans, span)) == 2


def test_a_refused_request_is_no_error_span(spans: list[Span]) -> None:
    """A refused request has no steps, and is no error of the service's."""
    span = find(spans, "refused")
    assert span.attributes["http.response.status_code"] == 401
    assert span.message.status.code == Status.STATUS_CODE_UNSET
    assert "productgraph.project.id" not in span.attributes
    assert find_children(spans, span) == []


def test_each_request_to_a_provider_is_a_span(spans: list[Span]) -> None:
    """Each request to a provider is a span, in error where the provider did not take it."""
    forwarded = [span for span in spans if span.name == "forward amplitude"]
    forwarded.sort(key=lambda span: span.duration)
    assert {span.message.kind for span in forwarded} == {SpanMessage.SPAN_KIND_CLIENT}
    codes = [span.attributes["http.response.status_code"] for span in forwarded]
    assert (codes[0], set(codes[1:])) == (503, {200})
    assert forwarded[0].attributes["error.type"] == "503"
    assert forwarded[0].message.status.code == Status.STATUS_CODE_ERROR
    assert forwarded[-1].message.status.code == Status.STATUS_CODE_UNSET
    assert all(span.duration[0] < span.duration[1] for span in forwarded)
    assert {span.attributes["server.address"] for span in forwarded} == {"127.0.0.1"}


def test_spans_contain_neither_keys_nor_credentials(traced: tuple[list[Span], Project]) -> None:
    """Neither keys nor credentials are in any span."""
    spans, project = traced
    assert len(spans) > 10
    for span in spans:
        assert SECRET not in str(span.message)
        assert project.key not in str(span.message)


@pytest.mark.slow
def test_standard_otel_variables_name_and_sample_the_service(
    create_migrated: Callable[[], str],
) -> None:
    """OpenTelemetry's own variables name the service, and choose what is sampled."""
    settings = {
        "DATABASE_URL": create_migrated(),
        "OTEL_SERVICE_NAME": "ingest-eu",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }
    with (
        Collector().running() as collector,
        running_service(settings | collector.settings | UNHURRIED) as service,
    ):
        project = create_project(service)
        assert post(service, project, "mine") == 202
        assert post(service, project, "sampled", traceparent=SAMPLED) == 202
        assert service.stop() == 0
        assert {span.request_id for span in collector.spans} == {"sampled", None}
        assert {span.resource["service.name"] for span in collector.spans} == {"ingest-eu"}


def run_python(
    program: str, settings: Mapping[str, str], timeout: float = 60
) -> "subprocess.CompletedProcess[str]":
    """Run a program with these settings and no others; fail if it fails."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=clean_environment(settings),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=True,
    )


STOP_TRACING = """
import time
from server.telemetry import tracing
from server.ingest.request_record import RequestRecorder
tracing._STOP_SECONDS = 0.5
traces = tracing.Tracing()
RequestRecorder((traces.requests,)).begin("http", "/v1/events").finish(401)
began = time.monotonic()
traces.stop()
print(time.monotonic() - began)
"""


def test_a_silent_collector_does_not_delay_the_end() -> None:
    """A collector that does not answer does not keep a process from its end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "600"}
        # Left to itself, OpenTelemetry waits for half a minute.
        assert float(run_python(STOP_TRACING, settings, timeout=120).stdout) < 20
        listener.accept()[0].close()  # it was asked


BUILD_WORKER = """
import os, sys
{before}
from server.app.parts import BUCKETS
from server.app.worker import Worker
from server.ingest.buckets import BucketTable
from server.config import read_settings
from server.logs import configure_logs
configure_logs("INFO")
os.environ[BUCKETS] = str(BucketTable().descriptor)
Worker(read_settings(), "postgresql://nowhere/none")
print(any(name.split(".")[0] == "opentelemetry" for name, module in sys.modules.items() if module))
"""


def build_worker(
    settings: Mapping[str, str], before: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Build a worker in a process of its own, which prints whether OpenTelemetry is imported."""
    ports = {"PORT": "0", "GRPC_PORT": "0"}
    return run_python(BUILD_WORKER.format(before=before), ports | dict(settings))


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("settings", "imported"),
    [({}, False), (ENDPOINT, True), (ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, False)],
)
def test_opentelemetry_is_not_imported_without_traces(
    settings: dict[str, str], imported: bool
) -> None:
    """Where traces are off, nothing of OpenTelemetry is imported."""
    assert build_worker(settings).stdout == f"{imported}\n"


def test_a_worker_serves_without_the_otel_extra() -> None:
    """Where traces are asked for without the extra, a warning names it, and the worker serves."""
    without = "sys.modules['opentelemetry'] = None"
    built = build_worker(ENDPOINT, without)
    assert built.stdout == "False\n"
    [line] = map(json.loads, built.stderr.splitlines())
    assert line["level"] == "WARNING"
    assert "extra otel is missing" in line["message"]
    assert "otel = [" in Path("pyproject.toml").read_text()
