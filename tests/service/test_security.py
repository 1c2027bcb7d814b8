"""SECURITY.md names tests that exist, and what no other module's tests show."""

import ast
import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import grpc
import pytest
from google.protobuf.descriptor_pool import Default
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.clients import Tenant, accepted, bind_ingest
from tests.support.projects import create_project
from tests.support.services import ROOT, Service, ask, clean_environment

SECURITY = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"`(test_\w+)`", SECURITY)
# Services whose methods need no key.
OPEN = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_the_tests_named_in_security_md_exist() -> None:
    """Each test that SECURITY.md names is there."""
    files = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    nodes = [node for text in files for node in ast.parse(text).body]
    assert set(NAMED) <= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_security_item_names_its_tests() -> None:
    """Each numbered item names tests, and names them so that they are found."""
    numbers = re.findall(r"^(\d+)\. ", SECURITY, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    items = re.split(r"^\d+\. |^## Dependencies", SECURITY, flags=re.MULTILINE)[1:-1]
    assert all("`test_" in item for item in items)
    assert len(NAMED) == SECURITY.count("test_")


@pytest.mark.parametrize("name", ["__proto__", "constructor", "$where", "__class__", "a.b[0]"])
def test_names_with_meanings_elsewhere_are_mere_data(name: str, tenant: Tenant) -> None:
    """Names that mean something elsewhere are stored like any other."""
    value = {name: {"polluted": True}}
    event = tenant.make_event({name: "x", "metadata": value})
    assert tenant.post_events([event]) == accepted(1)
    [row] = tenant.read_rows()
    assert (row["attributes"], row["metadata"]) == ({name: "x"}, value)


def test_the_last_of_repeated_names_counts(tenant: Tenant) -> None:
    """Of a name that is there twice the last value counts: no check sees another one."""
    text = f'"project_id": "{tenant.project.id}", "session.id": "s", "event.type": "custom"'
    stranger = f'{{"event_id": "1", {text}, "event.timestamp": "2024-01-15", "project_id": "x"}}'
    ours = (
        f'{{"event_id": "x", {text}, "event.timestamp": "2024-01-15T10:30:00Z", "event_id": "2"}}'
    )
    outcome = tenant.post(f'{{"events": [{stranger}, {ours}]}}'.encode()).json
    assert (outcome["accepted"], outcome["rejected"]) == (1, 1)
    assert [row["event_id"] for row in tenant.read_rows()] == ["2"]


def test_dripping_clients_do_not_block_others(tenant: Tenant) -> None:
    """Two hundred clients that never finish their heads keep nobody else from being served."""
    with ExitStack() as stack:
        for _ in range(200):
            place = ("127.0.0.1", tenant.service.http_port)
            dripping = stack.enter_context(socket.create_connection(place, timeout=10))
            dripping.sendall(b"POST /v1/events HTTP/1.1\r\nX")
        assert tenant.post_events([tenant.make_event()]) == accepted(1)
        assert ask(f"{tenant.service.http_url}/health") == 200


def test_forwarded_headers_of_a_client_change_nothing(tenant: Tenant) -> None:
    """What a client says of itself as a proxy would changes nothing."""
    forwarded = {"x_forwarded_for": "127.0.0.1", "x_forwarded_host": "evil.example"}
    forwarded |= {"forwarded": "for=127.0.0.1;host=evil.example", "x_forwarded_proto": "gopher"}
    answer = tenant.post({"events": []}, **forwarded)
    assert answer.json == accepted(0)
    assert "evil" not in str(answer.headers)
    assert tenant.post({"events": []}, x_pg_api_key="x", **forwarded).status == 401


def test_other_projects_are_not_revealed(tenant: Tenant) -> None:
    """An event of another project is rejected in the same words, whether that exists or not."""
    existing = create_project(tenant.service).id
    events = [tenant.make_event({"project_id": name}) for name in (existing, "proj_none")]
    outcome = tenant.post_events([*events, tenant.make_event()])
    assert outcome["accepted"] == 1
    assert len({error["error"] for error in outcome["errors"]}) == 1


def test_credentials_that_browsers_add_are_ignored(tenant: Tenant) -> None:
    """Nothing that a browser adds by itself is taken for a key, and no cookie is set."""
    key = tenant.project.key
    ambient = {"cookie": f"X-PG-API-Key={key}", "authorization": f"Bearer {key}"}
    answer = tenant.post({"events": []}, x_pg_api_key=None, origin="https://a.example", **ambient)
    assert answer.status == 401
    assert answer.headers["Set-Cookie"] is None


FORGED = 'x\n{"level": "forged"}\r\x1b[2J\x00\x7f\ud800'
LOGGING = f"""
import logging
from server.logs import configure_logs
configure_logs("INFO")
logging.getLogger("x").info("%s", {FORGED!r}, extra={{"field": {FORGED!r}, "big": 1 << 70}})
"""


def run_logging(stderr: int) -> None:
    """Log something hostile."""
    environment = clean_environment({})
    subprocess.run([sys.executable, "-c", LOGGING], env=environment, stderr=stderr, check=True)


def test_hostile_log_texts_stay_one_json_line() -> None:
    """Whatever is logged is one JSON object on one line, with its control characters escaped."""
    with tempfile.TemporaryFile() as log:
        run_logging(log.fileno())
        log.seek(0)
        text = log.read().decode()
    assert text.endswith("\n")
    line = text.removesuffix("\n")
    assert not re.search(r"[\x00-\x1f]", line)
    record = json.loads(line)
    assert (record["level"], record["message"], record["field"]) == ("INFO", FORGED, FORGED)


def test_hostile_log_texts_cannot_control_a_terminal() -> None:
    """A terminal is shown one line too, and gets nothing to obey."""
    reading, writing = pty.openpty()
    with open(reading, "rb", buffering=0) as terminal:
        run_logging(writing)
        os.close(writing)
        text = b""
        with suppress(OSError):  # which is how the end of a terminal is read
            while part := terminal.read(65536):
                text += part
    assert text.endswith(b"\r\n")
    assert not re.search(rb"[\x00-\x1f\x7f]", text.removesuffix(b"\r\n"))


def list_closed_methods(channel: grpc.Channel) -> Iterator[tuple[str, str]]:
    """Yield the methods that need a key, by service, among all that reflection lists."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = stub.ServerReflectionInfo(iter([asked]), timeout=10)
    for name in {offered.name for offered in answer.list_services_response.service} - OPEN:
        for method in Default().FindServiceByName(name).methods:
            yield name, method.name


def test_every_grpc_method_but_health_needs_a_key(service: Service) -> None:
    """Without a key, nothing can be called but health and reflection."""
    with grpc.insecure_channel(service.grpc_target) as channel:
        closed = list(list_closed_methods(channel))
        assert closed
        for name, method in closed:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/{name}/{method}", bytes, bytes)(b"", timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_large_grpc_metadata_is_refused_alone(tenant: Tenant) -> None:
    """Metadata far over gRPC's default limit is refused, and the next call served."""
    with grpc.insecure_channel(tenant.service.grpc_target) as channel:
        ingest = bind_ingest(channel)
        key = ("x-pg-api-key", tenant.project.key)
        with pytest.raises(grpc.RpcError) as refused:
            ingest(b"", timeout=10, metadata=(key, ("x-large", "y" * 100_000)))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        ingest(b"", timeout=10, metadata=(key,))


# https://www.rfc-editor.org/rfc/rfc9113#section-6
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS_FRAME, PING_FRAME, GOAWAY_FRAME = 4, 6, 7
ENHANCE_YOUR_CALM = 11


def make_frame(kind: int, payload: bytes = b"") -> bytes:
    """Return an HTTP/2 frame of the connection as a whole."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, 0, 0) + payload


def read_frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Yield the frames that come until the server closes the connection: kind and payload."""
    with connection.makefile("rb") as stream:
        while head := stream.read(9):
            yield head[3], stream.read(int.from_bytes(head[:3], "big"))


def test_a_client_that_floods_pings_is_dismissed(service: Service) -> None:
    """A gRPC client that floods the server with pings is sent away."""
    host, port = service.grpc_target.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(PREFACE + make_frame(SETTINGS_FRAME))
        connection.sendall(make_frame(PING_FRAME, b"\0" * 8) * 20)
        [goodbye] = [data for kind, data in read_frames(connection) if kind == GOAWAY_FRAME]
    assert int.from_bytes(goodbye[4:8], "big") == ENHANCE_YOUR_CALM
    assert goodbye[8:] == b"too_many_pings"
