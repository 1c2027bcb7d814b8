"""Fail points kill one process each, and nobody where they are off."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from server import failpoints
from tests.support.services import clean_environment

POINTS = [failpoints.BEFORE_COMMIT, failpoints.AFTER_COMMIT, failpoints.AFTER_PROVIDER]
REACH = "import sys; from server import failpoints; failpoints.reach(sys.argv[1])"


def start(point: str, settings: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Return a process that reaches a point."""
    command = [sys.executable, "-c", REACH, point]
    return subprocess.Popen(command, env=clean_environment(settings))


@pytest.mark.parametrize("point", POINTS)
def test_an_armed_failpoint_kills_one_process(point: str, tmp_path: Path) -> None:
    """Of several processes that reach an armed point, one is killed, and no other point kills."""
    (tmp_path / point).touch()
    settings = {"PRODUCTGRAPH_FAILPOINTS": str(tmp_path)}
    others = [start(other, settings) for other in POINTS if other != point]
    assert [process.wait(30) for process in others] == [0, 0]
    rivals = [start(point, settings) for _ in range(3)]
    assert sorted(process.wait(30) for process in rivals) == [-signal.SIGKILL, 0, 0]
    assert not list(tmp_path.iterdir())


def test_an_unarmed_failpoint_kills_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable no file kills, be it where the process runs."""
    point = tmp_path / failpoints.BEFORE_COMMIT
    point.touch()
    monkeypatch.chdir(tmp_path)
    for settings in ({}, {"PRODUCTGRAPH_FAILPOINTS": ""}):
        assert start(point.name, settings).wait(30) == 0
    assert point.exists()
