"""Running services for tests: real processes on real ports with a real database."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil  # type: ignore[import-untyped]
from sqlalchemy import text

from server.storage.connection import Engine, connected
from server.storage.embedded import EmbeddedPostgres
from tests.support.commands import fork_command
from tests.support.database import WAITING_LOCKS, Database

ROOT = Path(__file__).parents[2]
_PLACES = re.compile(r"HTTP  http://localhost:(\d+)\n  gRPC  localhost:(\d+)\n")
# Beside two other services that start on two cores, a start was seen to take half a minute.
_START_SECONDS = 180.0
# Of the harnesses that tests run: a busy machine must not fail a test.
_PATIENCE = 4
_METRICS_PLACE = re.compile(r"  metrics  http://localhost:(\d+)/metrics\n")


@dataclass(frozen=True)
class Service:
    """`productgraph serve` in a process of its own."""

    process: subprocess.Popen[bytes]
    settings: Mapping[str, str]
    output: Path
    log: Path

    @property
    def http_port(self) -> int:
        """The number of its HTTP port."""
        return self._read_ports()[0]

    @property
    def http_url(self) -> str:
        """Where its HTTP port is."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_target(self) -> str:
        """Where its gRPC port is."""
        return f"127.0.0.1:{self._read_ports()[1]}"

    @property
    def metrics_url(self) -> str:
        """Where its metrics are; fails where there are none."""
        found = _METRICS_PLACE.search(self.output.read_text())
        assert found, "no metrics"
        return f"http://127.0.0.1:{found[1]}/metrics"

    @property
    def database_url(self) -> str:
        """Its database, as libpq takes it."""
        if url := self.settings.get("DATABASE_URL"):
            return url
        return EmbeddedPostgres(Path(self.settings["DATA_DIR"]), create=False).url

    def find_workers(self) -> list[psutil.Process]:
        """Return the processes of its workers."""
        return self._find_children("worker")

    def find_forwarders(self) -> list[psutil.Process]:
        """Return the processes of its forwarders."""
        return self._find_children("forward")

    def _find_children(self, command: str) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if _read_words(child)[-1:] == [command]]

    def read_log(self) -> list[dict[str, Any]]:
        """Return the records of its log so far; fail on a line that is no JSON object."""
        written, _, _ = self.log.read_text().rpartition("\n")
        records = [json.loads(line) for line in written.splitlines()]
        assert all(isinstance(record, dict) for record in records)
        return records

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run another command of `productgraph` with the same settings."""
        return run_command(*arguments, settings=self.settings)

    def is_waiting_for_lock(self) -> bool:
        """Whether a commit, or another query of the database, has begun and waits for a table."""
        waiting = f"SELECT count(*) FROM {WAITING_LOCKS}"
        return Database(self.database_url).query(waiting) != [(0,)]

    def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)

    def is_ready(self) -> bool:
        """Whether the banner is printed and /ready says so."""
        if self.process.poll() is not None:
            raise AssertionError(f"the service ended: {self.log.read_text()}")
        return bool(self._read_ports()) and ask(f"{self.http_url}/ready") == 200

    def _read_ports(self) -> tuple[int, ...]:
        found = _PLACES.search(self.output.read_text())
        return tuple(map(int, found.groups())) if found else ()


def _read_words(process: psutil.Process) -> list[str]:
    """Return the command line of a process; nothing if it has just ended."""
    with suppress(psutil.NoSuchProcess):  # a zombie, too
        return list(process.cmdline())
    return []


def run_command(*arguments: str, settings: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run `productgraph` with these settings and no others."""
    return fork_command(arguments, clean_environment(settings), timeout=60)


def clean_environment(settings: Mapping[str, str], root: Path = ROOT) -> dict[str, str]:
    """Return what a command needs to run the code in `root`, and these settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    path = f"{root}{os.pathsep}{root / 'gen'}"
    return kept | {"PYTHONPATH": path, "METRICS_PORT": "0"} | dict(settings)


def run_program(module: str, *arguments: str, timeout: float) -> "subprocess.CompletedProcess[str]":
    """Run a program of the tests' to its end, which `timeout` seconds must be enough for."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=clean_environment({"PATIENCE": str(_PATIENCE)}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def break_build(root: Path, file: str, right: str, wrong: str) -> None:
    """Make a copy of the service in `root` in which a piece of one file is another one."""
    for directory in ("server", "gen"):
        shutil.copytree(ROOT / directory, root / directory)
    root.chmod(0o755)
    content = (root / file).read_text()
    assert content.count(right) == 1
    (root / file).write_text(content.replace(right, wrong))


@contextmanager
def running_service(settings: Mapping[str, str], root: Path = ROOT) -> Iterator[Service]:
    """Provide a service of the code in `root`, on free ports and ready; stop it at the end."""
    with tempfile.TemporaryDirectory() as directory:
        output, log = Path(directory, "output"), Path(directory, "log")
        with output.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve"],
                cwd=root,
                env=clean_environment({"PORT": "0", "GRPC_PORT": "0"} | dict(settings), root),
                stdout=stdout,
                stderr=stderr,
            )
        service = Service(process, settings, output, log)
        try:
            wait_until(service.is_ready, _START_SECONDS)
            yield service
            if process.poll() is None:
                service.stop()
        finally:
            process.kill()
            process.wait()


def ask(url: str) -> int | None:
    """Return the status of a GET, or None if there is no answer."""
    try:
        with urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Return as soon as the condition holds; fail if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def wait_for(read: Callable[[], object], wanted: object, seconds: float = 60.0) -> None:
    """Return as soon as what is read is as wanted; fail with what it is instead."""
    deadline = time.monotonic() + seconds
    while (found := read()) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found == wanted


def query(engine: Engine, statement: str) -> list[tuple[object, ...]]:
    """Return the rows of a query."""
    with connected(engine) as connection:
        return [tuple(row) for row in connection.execute(text(statement))]
