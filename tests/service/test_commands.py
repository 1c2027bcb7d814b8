"""The command line: what `productgraph` prints, accepts and refuses."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import psycopg2
import pytest
from sqlalchemy.engine import make_url

from tests.support.events import make_event
from tests.support.load import GrpcClient, HttpClient, send
from tests.support.projects import Project
from tests.support.services import (
    ROOT,
    Service,
    ask,
    clean_environment,
    run_command,
    running_service,
)

KEY = re.compile(r"pgk_[a-z2-7]{40}")
PASSWORD = "correct-horse-battery"


@dataclass(frozen=True)
class FirstStart:
    """What became of a start on an empty data directory, and of the commands it printed."""

    settings: dict[str, str]
    printed: str
    curl: str
    grpcurl: str
    rows: int

    @property
    def key(self) -> str:
        """The API key that was printed."""
        return self.keys[0]

    @property
    def keys(self) -> list[str]:
        """All keys in what was printed, as often as they are there."""
        return [found[0] for found in KEY.finditer(self.printed)]


@pytest.fixture(scope="module")
def first_start(open_directory: Path) -> FirstStart:
    """Start a service on an empty data directory, use it as it prints, and stop it."""
    settings = {"DATA_DIR": str(open_directory / "first")}
    with running_service(settings) as service:
        printed = service.output.read_text()
        curl = run_in_shell(find_command("curl", printed))
        grpcurl = run_in_shell(translate_grpcurl(find_command("grpcurl", printed)))
        return FirstStart(settings, printed, curl, grpcurl, count_events(service))


def find_command(name: str, printed: str) -> str:
    """Return a command of the banner, with its continued lines."""
    found = re.search(rf"^  {name} (.*\\\n)*.*", printed, re.MULTILINE)
    assert found
    return found[0].replace("\\\n", "")


def translate_grpcurl(command: str) -> str:
    """Return the command for `buf curl` if grpcurl is not installed."""
    if shutil.which("grpcurl"):
        return command
    command, address, method = command.rsplit(maxsplit=2)
    buf = shlex.quote(str(Path(sys.executable).with_name("buf")))
    how = f"{buf} curl --protocol grpc --http2-prior-knowledge"
    translated = re.sub(r"^ *grpcurl -plaintext -emit-defaults", f"{how} --emit-defaults", command)
    assert translated != command
    return f"{translated} http://{address}/{method}"


def run_in_shell(command: str) -> str:
    """Return what a pasted command prints."""
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def count_events(service: Service) -> int:
    """Return the number of rows in the table."""
    with closing(psycopg2.connect(service.database_url)) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT count(*) FROM events")
        return int(cursor.fetchone()[0])  # type: ignore[index]


def assert_fails(arguments: str, settings: dict[str, str], *words: str) -> str:
    """Return the one line that a failing command prints, which must have these words in it."""
    done = run_command(*arguments.split(), settings=settings)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"productgraph: .+\n", done.stderr), done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    return done.stderr


def test_the_first_start_shows_one_key(first_start: FirstStart) -> None:
    """The first start shows one key, in full, as the one to copy and in both commands."""
    assert first_start.keys == [first_start.key] * 3


def test_the_printed_curl_command_stores_an_event(first_start: FirstStart) -> None:
    """The printed curl command stores an event."""
    assert first_start.curl.startswith("HTTP/1.1 202")
    body = json.loads(first_start.curl.splitlines()[-1])
    assert body == {"accepted": 1, "rejected": 0, "errors": []}


def test_the_printed_grpcurl_command_stores_an_event(first_start: FirstStart) -> None:
    """The printed grpcurl command stores another one."""
    assert json.loads(first_start.grpcurl) == {"accepted": 1, "rejected": 0, "errors": []}
    assert first_start.rows == 2


@pytest.mark.slow
def test_every_start_shows_how_to_send_events(first_start: FirstStart) -> None:
    """A later start shows no key, but commands that make one and store events with it."""
    command = {"PRODUCTGRAPH_COMMAND": str(ROOT / "scripts/productgraph")}
    with running_service(first_start.settings | command) as service:
        printed = service.output.read_text()
        [make_key] = re.findall(r"^  (KEY=.*)$", printed, re.MULTILINE)
        make_key = f"export DATA_DIR={shlex.quote(first_start.settings['DATA_DIR'])}\n{make_key}"
        answer = run_in_shell(f"{make_key}\n{find_command('curl', printed)}")
        assert json.loads(answer.splitlines()[-1]) == {"accepted": 1, "rejected": 0, "errors": []}
        grpcurl = translate_grpcurl(find_command("grpcurl", printed))
        answer = run_in_shell(f"{make_key}\n{grpcurl}")
        assert json.loads(answer) == {"accepted": 1, "rejected": 0, "errors": []}


@pytest.mark.slow
def test_a_second_start_keeps_events_and_key(first_start: FirstStart) -> None:
    """A second start on the same data finds the same events and key, and shows none."""
    with running_service(first_start.settings) as service:
        assert not KEY.search(service.output.read_text())
        assert count_events(service) >= first_start.rows
        with closing(HttpClient(service, first_start.key)) as client:
            assert send(client, [make_event("proj_demo")]) == "202"


@pytest.mark.parametrize("setting", ["PORT", "GRPC_PORT"])
def test_a_taken_port_fails_the_start_by_name(setting: str, service: Service) -> None:
    """A second start on a port fails with one line that names it."""
    port = {"PORT": service.http_url, "GRPC_PORT": service.grpc_target}[setting].rpartition(":")[2]
    ports = {"PORT": "0", "GRPC_PORT": "0"} | {setting: port}
    assert_fails("serve", dict(service.settings) | ports, port, setting)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("PORT", "http"),
        ("GRPC_PORT", "65536"),
        ("WORKERS", "0"),
        ("HOST", "not.a.host.invalid"),
        ("DATABASE_URL", "mysql://localhost/events"),
        ("CORS_ALLOWED_ORIGINS", "example.com"),
        ("GRPC_REFLECTION", "maybe"),
        ("LOG_LEVEL", "LOUD"),
        ("DEBUG", "2"),
        ("REQUEST_TIMEOUT_SECONDS", "soon"),
        ("MAX_WAITING_MB", "-1"),
        ("DATA_DIR", "/dev/null"),
    ],
)
def test_a_bad_setting_fails_the_start_by_name(setting: str, value: str) -> None:
    """A setting that cannot be used ends the start with one line that names it."""
    assert_fails("serve", {setting: value}, setting)


@pytest.mark.parametrize("command", ["keys list", "keys create --project p", "keys revoke 1"])
def test_key_commands_create_no_database(command: str, tmp_path: Path) -> None:
    """Commands for keys make no database, and name the settings that say where one is."""
    directory = tmp_path / "none"
    assert_fails(command, {"DATA_DIR": str(directory)}, "DATABASE_URL", "DATA_DIR")
    assert not directory.exists()


def test_a_key_works_from_creation_to_revocation(service: Service, project: Project) -> None:
    """A created key is printed alone and works at once; a revoked one ends and is listed so."""
    created = service.run("keys", "create", "--project", project.id, "--name", "website")
    key = created.stdout.strip()
    assert KEY.fullmatch(key)
    assert (created.stdout, created.stderr) == (f"{key}\n", "")
    with closing(HttpClient(service, key)) as client:
        assert send(client, [make_event(project.id)]) == "202"
    (line,) = find_listed(service, "website")
    assert key not in line
    assert line.endswith(" -")
    number = line.split()[0]
    assert service.run("keys", "revoke", number).returncode == 0
    assert not find_listed(service, "website")[0].endswith(" -")
    again = service.run("keys", "revoke", number)
    assert (again.returncode, len(again.stderr.splitlines())) == (1, 1)


def find_listed(service: Service, name: str) -> list[str]:
    """Return the lines of `keys list` with this name."""
    return [line for line in service.run("keys", "list").stdout.splitlines() if name in line]


@pytest.mark.parametrize("project", ["", "p" * 300, "proj\nline", "proj\x1b[1m", "\udcff"])
def test_a_key_needs_a_project_that_events_can_name(project: str, service: Service) -> None:
    """No key is made for a project whose id no event can have."""
    done = service.run("keys", "create", "--project", project)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--project" in done.stderr


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(service: Service) -> None:
    """A command whose output nobody reads to its end shows no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "server", "keys", "list"],
        env=clean_environment(service.settings),
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_service_refuses_an_unmigrated_database_with_advice(
    create_database: Callable[[], str],
) -> None:
    """A service refuses to start on an empty database, with advice that helps."""
    settings = {"DATABASE_URL": create_database(), "PORT": "0", "GRPC_PORT": "0"}
    assert_fails("serve", settings, "productgraph migrate")
    assert_fails("keys list", settings, "productgraph migrate")
    assert run_command("migrate", settings=settings).returncode == 0
    with running_service(settings) as service:
        assert service.is_ready()


@pytest.mark.parametrize(
    "command",
    [
        "keys revoke 424242",
        "keys limit 424242 --rate 5",
        "rejected show 424242",
        "rejected replay 424242",
        "forward dead show 424242",
        "forward dead retry 424242",
        "forward dead purge 424242",
    ],
)
def test_a_number_that_is_not_there_is_a_failure(command: str, service: Service) -> None:
    """A command that finds nothing by a number exits with 1 and names it."""
    done = service.run(*command.split())
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("productgraph: no ")
    assert "424242" in line


def test_keys_can_be_listed_as_json(service: Service, project: Project) -> None:
    """`keys list --json` prints one object a line, with everything but the key."""
    service.run("keys", "create", "--project", project.id, "--name", "a\nb", "--rate", "5")
    done = service.run("keys", "list", "--json")
    listed = [json.loads(line) for line in done.stdout.splitlines()]
    [found] = [key for key in listed if key["name"] == "a\nb"]
    assert (found["project_id"], found["event_rate"], found["byte_rate"]) == (project.id, 5, None)
    assert found["revoked_at"] is None


def test_psql_opens_the_database(service: Service) -> None:
    """`psql` runs a query in the service's database, shows it expanded, and hides the password."""
    done = service.run("psql", "-c", "SELECT count(*) AS tables FROM api_keys")
    assert (done.returncode, done.stderr) == (0, "")
    assert "-[ RECORD 1 ]" in done.stdout
    failed = service.run("psql", "-c", "nonsense")
    assert failed.returncode == 1


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("serve", "127.0.0.1:{port}/events"),
        ("migrate", "127.0.0.1:{port}/events"),
        ("keys list", "127.0.0.1:{port}/events"),
        ("migrate", "127.0.0.1:not-a-port/events"),
        ("migrate", "127.0.0.1:99999/events"),
        ("migrate", "not.a.host.invalid/events"),
        ("migrate", "[::1/events"),
        ("migrate", "127.0.0.1:{port}/events?sslmode=nonsense"),
        ("migrate", "127.0.0.1:{port}/events?nonsense=1"),
        ("migrate", "@127.0.0.1/events"),
    ],
)
def test_database_errors_do_not_show_the_password(command: str, place: str) -> None:
    """Whatever is wrong with DATABASE_URL, the one line about it does not show the password."""
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))  # and never listens
        url = f"postgresql://someone:{PASSWORD}@{place.format(port=silent.getsockname()[1])}"
        settings = {"DATABASE_URL": url, "PORT": "0", "GRPC_PORT": "0", "DEBUG": "true"}
        assert PASSWORD not in assert_fails(command, settings)


class Talkative(NamedTuple):
    """What a service with DEBUG=true, and a password, has shown by its end."""

    password: str
    command_lines: str
    printed: str
    records: list[dict[str, Any]]


@pytest.fixture(scope="module")
def talkative(create_migrated: Callable[[], str]) -> Talkative:
    """Run such a service, ask it for something, and stop it."""
    url = make_url(create_migrated())
    if url.password is None:
        url = url.set(password=PASSWORD)
    shown = url.render_as_string(hide_password=False)
    with running_service({"DATABASE_URL": shown, "DEBUG": "true"}) as service:
        assert ask(f"{service.http_url}/nowhere") == 404
        parent = psutil.Process(service.process.pid)
        processes = [parent, *parent.children(recursive=True)]
        command_lines = " ".join(word for process in processes for word in process.cmdline())
        service.stop()
        printed = service.log.read_text() + service.output.read_text()
        return Talkative(str(url.password), command_lines, printed, service.read_log())


def test_a_running_service_does_not_show_the_password(talkative: Talkative) -> None:
    """A running service shows the password neither in its logs nor in the list of processes."""
    assert talkative.password not in talkative.command_lines + talkative.printed


def test_every_log_line_is_a_complete_json_object(talkative: Talkative) -> None:
    """Every line of the log is a JSON object with a time, a level, a logger and a message."""
    assert {"DEBUG", "INFO"} <= {record["level"] for record in talkative.records}
    for record in talkative.records:
        assert {"time", "level", "logger", "message"} <= record.keys()


def test_connections_are_spread_over_both_workers(create_migrated: Callable[[], str]) -> None:
    """With WORKERS=2, connections of both protocols are spread over both workers."""
    with ExitStack() as stack:
        settings = {"DATABASE_URL": create_migrated(), "WORKERS": "2"}
        service = stack.enter_context(running_service(settings))
        for kind in (HttpClient, GrpcClient):
            for _ in range(20):
                client = stack.enter_context(closing(kind(service, "pgk_nonsense")))
                assert send(client, []) in {"401", "UNAUTHENTICATED"}
        ports = {service.http_port, int(service.grpc_target.rpartition(":")[2])}
        for worker in service.find_workers():
            open_ones = [c for c in worker.net_connections() if c.status == "ESTABLISHED"]
            assert {connection.laddr.port for connection in open_ones} >= ports
