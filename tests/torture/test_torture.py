"""scripts/torture finds nothing wrong with the service, and what is wrong with broken ones."""

import re
import struct
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import connection as Connection

from server.storage.embedded import EmbeddedPostgres
from tests.support.services import ROOT, break_build, run_program
from tests.torture.cluster import Cluster, Setup
from tests.torture.wire import FrontendMessages

_RUN_SECONDS = 1800.0


@dataclass(frozen=True)
class Bug:
    """A build in which a piece of a file is another one, and a pattern of the finding."""

    file: str
    right: str
    wrong: str
    fault: str
    finding: str


ANSWERS_BEFORE_COMMIT = Bug(
    "ingest/group_commit.py",
    "        try:\n            self._save(group, node, others_wait=others_wait)\n",
    "        _settle(group)\n"
    "        try:\n            self._save(group, node, others_wait=others_wait)\n",
    "kill-before-commit",
    "acknowledged and not stored",
)
NO_UNIQUE_KEY = Bug(
    "migrations/versions/0001_events_and_api_keys.py",
    "DEFAULT now(),\n    PRIMARY KEY (project_id, event_timestamp, event_id)\n",
    "DEFAULT now()\n",
    "calm",
    "stored twice",
)
COMMITS_WITHOUT_SYNC = Bug(
    "storage/events.py",
    "SET LOCAL synchronous_commit = {{commit_level}};\n",
    "SET LOCAL synchronous_commit = off;\n",
    "database-kill",
    "acknowledged and not stored",
)
SECOND_TRANSACTION = Bug(
    "storage/events.py",
    "        failpoints.reach(failpoints.BEFORE_COMMIT)\n",
    '        cursor.execute("COMMIT; BEGIN")\n        failpoints.reach(failpoints.BEFORE_COMMIT)\n',
    "kill-before-commit",
    "neither delivered to",
)
LEASE_IGNORED = Bug(
    "storage/outbox.py",
    "SET lease = :lease, due_at = now() + make_interval(secs => :seconds)\n WHERE",
    "SET lease = :lease, due_at = now() + make_interval(secs => 0 * :seconds)\n WHERE",
    "forwarder-kill",
    "again within their lease",
)
DEADLINE_BEFORE_MAPPING = Bug(
    "forwarding/lane.py",
    "Window(begun + _ROUND_SECONDS, latest)",
    "Window(begun + 0.2, begun + 0.2)",
    "dense-events",
    "was sent nothing in",
)
LOGS_EVENTS = Bug(
    "ingest/group_commit.py",
    '_log.debug("a group was not stored",',
    '_log.warning("not stored: " + group[0].rows[0].text,',
    "database-stop",
    "holds a secret",
)
NO_LOCK_TIMEOUT = Bug(
    "storage/events.py",
    "SET LOCAL lock_timeout = {{lock_ms}};\n",
    "",
    "held-row",
    "answered (503|UNAVAILABLE)",  # by the protocol over which the held row is met first
)
NO_KEEPALIVES = Bug(
    "storage/connection.py",
    "SET LOCAL tcp_keepalives_idle = 5;\nSET LOCAL tcp_keepalives_interval = 1;\n"
    "SET LOCAL tcp_keepalives_count = 3;\nSET LOCAL tcp_user_timeout = 8000;\n",
    "",
    "vanish-in-copy",
    "after the peer vanished",
)
NOTICE_IGNORED = Bug(
    "storage/connection.py",
    "    if driver.notices:\n",
    "    if False:\n",
    "primary-partition",
    "acknowledged and not stored",
)
BUGS = {name: bug for name, bug in globals().items() if isinstance(bug, Bug)}


def run_torture(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end."""
    return run_program("tests.torture", *arguments, timeout=_RUN_SECONDS)


@pytest.mark.slow
def test_a_few_rounds_of_each_fault_pass(tmp_path: Path) -> None:
    """A few rounds of each fault find nothing wrong."""
    record = tmp_path / "record.md"
    finished = run_torture("--quick", f"--record={record}", f"--logs={tmp_path / 'logs'}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "No violation." in record.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rounds"),
    [
        *(("primary-kill", 2), ("primary-freeze", 2), ("primary-partition", 2)),
        *(("standby-away-60", 1), ("read-only", 2)),
    ],
)
def test_a_pair_keeps_what_it_acknowledged(fault: str, rounds: int, tmp_path: Path) -> None:
    """A pair that fails over, or cannot confirm for a while, loses nothing and doubles nothing."""
    finished = run_torture(
        f"--fault={fault}", f"--rounds={rounds}", f"--logs={tmp_path / 'logs'}", "--hurry"
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_the_harness_finds_a_seeded_bug(name: str, tmp_path: Path) -> None:
    """A build with this bug is found out, by what it does to events."""
    bug = BUGS[name]
    break_build(tmp_path / "root", f"server/{bug.file}", bug.right, bug.wrong)
    finished = run_torture(
        f"--root={tmp_path / 'root'}",
        f"--logs={tmp_path / 'logs'}",
        f"--fault={bug.fault}",
        "--rounds=20",
        "--hurry",
    )
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert re.search(bug.finding, finished.stdout)


def test_each_seeded_bug_finds_its_line() -> None:
    """What a seeded bug changes stands in its file once."""
    places = {
        name: (ROOT / "server" / bug.file).read_text().count(bug.right)
        for name, bug in BUGS.items()
    }
    assert places == dict.fromkeys(BUGS, 1)


@pytest.mark.slow
def test_an_unknown_fault_is_answered_with_known_ones() -> None:
    """A misspelt fault ends the command with the names there are."""
    finished = run_torture("--fault", "servise-kill")
    assert finished.returncode == 2
    assert "service-kill" in finished.stderr


def test_a_harness_query_replaces_a_broken_connection(open_directory: Path) -> None:
    """A query of the harness is run again if its connection breaks meanwhile."""
    cluster = Cluster(open_directory / "torture", Setup(), ROOT, "1")
    pids: list[int] = []

    def read_pid(connection: Connection) -> int:
        cursor = connection.cursor()
        cursor.execute("SELECT pg_backend_pid()")
        pids.extend(pid for (pid,) in cursor.fetchall())
        if len(pids) == 1:
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return pids[-1]

    with ExitStack() as stack:
        for provider in cluster.providers.values():
            stack.enter_context(provider)
        stack.enter_context(EmbeddedPostgres(cluster.data, create=True))
        assert cluster.use_connection(read_pid) == pids[1]


def frame(kind: bytes, content: bytes) -> bytes:
    """Return a message of PostgreSQL's protocol."""
    return kind + struct.pack("!I", len(content) + 4) + content


SSL_REQUEST = frame(b"", struct.pack("!I", 80877103))
STARTUP = frame(b"", struct.pack("!I", 196608) + b"user\0me\0\0")
COPY = frame(b"Q", b"COPY events FROM STDIN\0")
ROWS = frame(b"d", b"COMMIT\tQ\0\0\0\x0bCOMMIT\0\n") + frame(b"c", b"")
COMMIT = frame(b"Q", b"COMMIT\0")


@given(st.lists(st.integers(0, 200)))
def test_the_commit_of_copied_rows_is_recognised(cuts: list[int]) -> None:
    """The COMMIT of a COPY is recognised wherever the stream is cut, and nothing else as one."""
    stream = SSL_REQUEST + STARTUP + COMMIT + COPY + ROWS + COMMIT
    ends = sorted({*(cut % len(stream) for cut in cuts), 0, len(stream)})
    pieces = [stream[a:b] for a, b in pairwise(ends)]
    messages = FrontendMessages()
    seen, commits = b"", []
    for message in (m for piece in pieces for m in messages.feed(piece)):
        seen += message
        if messages.commits_rows(message):
            commits.append(len(seen))
    assert seen == stream
    assert commits == [len(stream)]
