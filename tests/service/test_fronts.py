"""The examples of proxies with TLS in scripts/deploy, run as they are but for ports and paths."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
import trustme

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from tests.support.clients import bind_ingest
from tests.support.ports import find_ports
from tests.support.projects import Project
from tests.support.services import ROOT, Service, wait_until

CA = trustme.CA()
CERTIFICATE = CA.issue_cert("localhost")
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Places:
    """Where a front listens, what is behind it, and where its files may be."""

    port: int
    http: str
    grpc: str
    directory: Path


@dataclass(frozen=True)
class Kind:
    """One of the programs: its example, what a test changes in it, and how it is run."""

    file: str
    changes: Callable[[Places], Mapping[str, str]]
    check: Callable[[Path, Path], list[str]]
    run: Callable[[Path, Path], list[str]]
    # How it is made to send slow clients away sooner.
    hurry: Mapping[str, str]


def change_nginx(places: Places) -> dict[str, str]:
    """Return the changes to nginx.conf."""
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{name}_temp_path {places.directory}/{name};\n" for name in paths)
    return {
        "worker_processes auto;": "worker_processes 1;",
        "worker_rlimit_nofile 65536;": "",
        "worker_connections 16384;": "worker_connections 100;",
        "server_tokens off;": f"server_tokens off;\n{temporary}",
        "listen 443 ssl": f"listen 127.0.0.1:{places.port} ssl",
        "listen [::]:443 ssl http2;": "",
        "server 127.0.0.1:8080;": f"server {places.http};",
        "server 127.0.0.1:50051;": f"server {places.grpc};",
        "/etc/productgraph": str(places.directory),
    }


def start_nginx(file: Path, directory: Path) -> list[str]:
    """How nginx is run in the foreground."""
    user = "user root; " if os.geteuid() == 0 else ""
    main = f"{user}daemon off; pid {directory}/pid; error_log stderr;"
    return ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(file), "-g", main]


def change_caddy(places: Places) -> dict[str, str]:
    """Return the changes to the Caddyfile."""
    return {
        "auto_https disable_redirects": "auto_https disable_redirects\nadmin off",
        "ingest.example.com {": f"https://localhost:{places.port} {{\nbind 127.0.0.1",
        "/etc/productgraph": str(places.directory),
        "127.0.0.1:8080": places.http,
        "127.0.0.1:50051": places.grpc,
    }


def run_caddy(command: str) -> Callable[[Path, Path], list[str]]:
    """How caddy is run in the foreground."""
    return lambda file, _: ["caddy", command, "--adapter", "caddyfile", "--config", str(file)]


KINDS = {
    "nginx": Kind(
        "nginx.conf",
        change_nginx,
        lambda file, directory: [*start_nginx(file, directory), "-t"],
        start_nginx,
        {" 10s;": " 1s;"},
    ),
    "caddy": Kind(
        "Caddyfile",
        change_caddy,
        run_caddy("validate"),
        run_caddy("run"),
        {"read_header 10s": "read_header 1s", "read_body 60s": "read_body 1s"},
    ),
}


def write_configuration(kind: Kind, places: Places, more: Mapping[str, str] | None = None) -> Path:
    """Write the example with the changes, each of which must find its place, and a certificate."""
    text = (ROOT / "scripts" / "deploy" / kind.file).read_text()
    for old, new in (*kind.changes(places).items(), *(more or {}).items()):
        assert old in text, old
        text = text.replace(old, new)
    chain = b"".join(part.bytes() for part in CERTIFICATE.cert_chain_pems)
    (places.directory / "chain.pem").write_bytes(chain)
    (places.directory / "key.pem").write_bytes(CERTIFICATE.private_key_pem.bytes())
    file = places.directory / kind.file
    file.write_text(text)
    return file


def trust() -> ssl.SSLContext:
    """Return what a client trusts."""
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


@dataclass(frozen=True)
class Front:
    """A running proxy."""

    port: int

    def request(self, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Return the status and the body of an answer over a new connection."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with closing(HTTPSConnection("localhost", self.port, timeout=30, context=trust())) as made:
            with suppress(ConnectionError):  # it may refuse the body before it has it all
                made.request("POST", path, body, named)
            answer = made.getresponse()
            return answer.status, answer.read()

    def is_listening(self) -> bool:
        """Whether somebody takes connections."""
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def running_front(
    kind: Kind, places: Places, more: Mapping[str, str] | None = None
) -> Iterator[Front]:
    """Provide a proxy, with more changes if they are given; stop it at the end."""
    file = write_configuration(kind, places, more)
    home = {name: str(places.directory) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    with (places.directory / "log").open("wb") as log:
        process = subprocess.Popen(
            kind.run(file, places.directory),
            env={"PATH": os.environ["PATH"]} | home,
            stdout=log,
            stderr=log,
        )
    front = Front(places.port)
    try:
        wait_until(lambda: process.poll() is not None or front.is_listening())
        assert process.poll() is None, (places.directory / "log").read_text()
        yield front
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each program that is on this machine."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return KINDS[request.param]


@pytest.fixture(scope="module")
def front(
    kind: Kind, service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    """Provide a proxy before the shared service."""
    http, directory = f"127.0.0.1:{service.http_port}", tmp_path_factory.mktemp("front")
    [port] = find_ports(1)
    places = Places(port, http, service.grpc_target, directory)
    with running_front(kind, places) as running:
        yield running


def test_each_proxy_accepts_its_example_configuration(kind: Kind, tmp_path: Path) -> None:
    """The program itself finds its example in order."""
    file = write_configuration(kind, Places(1, "127.0.0.1:2", "127.0.0.1:3", tmp_path))
    done = subprocess.run(kind.check(file, tmp_path), capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr


def test_events_over_https_pass_through_a_proxy(front: Front, project: Project) -> None:
    """Events that come over HTTPS are accepted."""
    event = {
        "event_id": "evt_1",
        "project_id": project.id,
        "session.id": "sess_1",
        "event.type": "custom",
        "event.timestamp": "2024-01-15T10:30:00Z",
    }
    body = json.dumps({"events": [event]}).encode()
    headers = {"Content_Type": "application/json", "X_PG_API_Key": project.key}
    assert front.request("/v1/events", body, **headers) == (
        202,
        b'{"accepted":1,"rejected":0,"errors":[]}',
    )


def test_grpc_calls_and_errors_pass_through_a_proxy(front: Front, project: Project) -> None:
    """Calls over gRPC come through the same port, and so do its errors."""
    credentials = grpc.ssl_channel_credentials(CA.cert_pem.bytes())
    with grpc.secure_channel(f"localhost:{front.port}", credentials) as channel:
        ingest = bind_ingest(channel)
        for _ in range(3):
            answer = ingest(b"", timeout=10, metadata=(("x-pg-api-key", project.key),))
            assert answer == IngestEventsResponse()
        with pytest.raises(grpc.RpcError, match="missing or invalid API key"):
            ingest(b"", timeout=10)


def test_a_proxy_refuses_only_far_too_large_bodies(front: Front, project: Project) -> None:
    """The service itself refuses what is a little too large, its front what is far too large."""
    headers = {"Content_Type": "application/json", "X_PG_API_Key": project.key}
    status, body = front.request("/v1/events", b" " * (10 * MEGABYTE + 1), **headers)
    assert (status, body) == (400, b'{"error":"body: larger than 10485760 bytes"}')
    status, _ = front.request("/v1/events", b" " * (12 * MEGABYTE), **headers)
    assert status in {413, 502}  # the latter by Caddy before 2.7, as the connection breaks


@pytest.mark.parametrize(
    "sent",
    [
        "POST /v1/events HTTP/1.1\r\nHo",
        "POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ],
    ids=["head", "body"],
)
def test_a_proxy_sends_a_slow_client_away(sent: str, kind: Kind, tmp_path: Path) -> None:
    """A client that does not finish its request is sent away."""
    [port] = find_ports(1)
    places = Places(port, "127.0.0.1:2", "127.0.0.1:3", tmp_path)
    with (
        running_front(kind, places, kind.hurry) as front,
        suppress(ConnectionError, ssl.SSLEOFError),  # on a busy machine during the handshake, even
        socket.create_connection(("127.0.0.1", front.port), timeout=30) as plain,
        trust().wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(sent.encode())
        while connection.recv(4096):
            pass


@dataclass(frozen=True)
class Behind:
    """An HTTP server that remembers its requests."""

    address: str
    # The name of each request, and the port that it came from.
    seen: list[tuple[str, int]] = field(default_factory=list)


@contextmanager
def running_behind() -> Iterator[Behind]:
    """Provide a server that stands in for the service."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            behind.seen.append((self.headers["X-Request-ID"], self.client_address[1]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        behind = Behind(f"127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield behind
        finally:
            server.shutdown()
            thread.join()


def test_a_proxy_names_requests_and_shares_connections(kind: Kind, tmp_path: Path) -> None:
    """Each request has a name, its own where it came with one; all share a connection."""
    with running_behind() as behind:
        [port] = find_ports(1)
        places = Places(port, behind.address, "127.0.0.1:3", tmp_path)
        with running_front(kind, places) as front:
            for headers in ({"X_Request_ID": "mine"}, {}, {}):
                assert front.request("/v1/events", b"{}", **headers)[0] == 200
    names = [name for name, _ in behind.seen]
    assert names[0] == "mine"
    assert len(set(names)) == 3
    assert all(names)
    assert len({port for _, port in behind.seen}) == 1
