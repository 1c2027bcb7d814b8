"""Signals that reach `serve` while it starts."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.storage.cluster import Cluster
from tests.support.services import ROOT, clean_environment, wait_until

pytestmark = pytest.mark.slow  # each has the whole life of a database

Start = Callable[[int], "subprocess.Popen[bytes]"]


@pytest.fixture
def data(open_directory: Path, request: pytest.FixtureRequest) -> Path:
    """Return a data directory that does not exist yet."""
    return open_directory / str(request.node.name)


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a service with a standard error, and wait until it creates its database."""
    with ExitStack() as stack, (tmp_path / "output").open("wb") as output:

        def start(stderr: int) -> "subprocess.Popen[bytes]":
            process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve"],
                cwd=ROOT,
                env=clean_environment({"PORT": "0", "GRPC_PORT": "0", "DATA_DIR": str(data)}),
                stdout=output,
                stderr=stderr,
                start_new_session=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            wait_until(lambda: list(data.glob("initdb-*")), seconds=60)
            return process

        yield start


def test_hangup_during_the_start_is_survived(start: Start, tmp_path: Path, data: Path) -> None:
    """Without a terminal SIGHUP asks for new workers, of which there are none yet."""
    with (tmp_path / "log").open("wb") as log:
        process = start(log.fileno())
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: "HTTP" in (tmp_path / "output").read_text(), seconds=120)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not Cluster(data).is_running()


def test_lost_terminal_leaves_nothing_running(start: Start, data: Path) -> None:
    """With a terminal SIGHUP says that it is gone: the service ends, and PostgreSQL with it."""
    reading, writing = pty.openpty()
    process = start(writing)
    os.close(writing)
    os.close(reading)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) in (0, 120)  # 120: the last words could not be written anywhere
    assert not Cluster(data).is_running()
