"""A new version takes over from the one before it without an interruption."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg2
import pytest
from sqlalchemy import text

from server.storage.connection import connected, open_engine
from tests.conftest import create_project
from tests.support.clients import Tenant, accepted, to_message
from tests.support.services import ROOT, for_sqlalchemy, query, run_command, running_service

TABLES = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
COMMITTER = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]


def git(*arguments: str, root: Path = ROOT) -> bytes:
    """What git says; skips the test where it cannot."""
    if not shutil.which("git"):
        pytest.skip("git is missing")
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no history here: {done.stderr.decode().strip()}")
    return done.stdout


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code from before the newest migration."""
    newest = max((ROOT / "server/migrations/versions").glob("[0-9]*.py")).relative_to(ROOT)
    added = git("log", "--diff-filter=A", "--format=%H", "-1", "--", str(newest)).decode().strip()
    root = tmp_path_factory.mktemp("previous")
    archive = git("archive", f"{added}^" if added else "HEAD", "server", "gen")
    subprocess.run(["tar", "-x", "-C", str(root)], input=archive, check=True)
    assert not (root / newest).exists()
    return root


def test_the_previous_version_runs_beside_this_one(
    previous: Path, create_migrated: Callable[[], str]
) -> None:
    """On the newest tables the previous version runs beside this one, and both store events."""
    settings = {"DATABASE_URL": create_migrated()}
    with ExitStack() as stack:
        old, new = (
            stack.enter_context(running_service(settings, root)) for root in (previous, ROOT)
        )
        assert Path(old.find_workers()[0].cwd()) == previous
        database = stack.enter_context(closing(psycopg2.connect(settings["DATABASE_URL"])))
        database.autocommit = True
        project = create_project(new)
        tenants = [Tenant(service, project, database) for service in (old, new)]
        for number, tenant in enumerate(tenants):
            both = tenant.make_event({"event_id": "evt_both"})
            own = tenant.make_event({"event_id": f"evt_http_{number}"})
            over_grpc = tenant.make_event({"event_id": f"evt_grpc_{number}"})
            bad = tenant.make_event({"event.type": "ui.hover"})
            assert tenant.post_events([both, own, bad])["accepted"] == 2
            assert tenant.ingest(map(to_message, [both, over_grpc])) == accepted(2)
        stored = [row["event_id"] for row in tenants[0].read_rows()]
        ids = ["evt_both", *(f"evt_{way}_{n}" for way in ("grpc", "http") for n in (0, 1))]
        assert stored == ids


def test_migrate_check_fails_until_nothing_is_to_do(create_database: Callable[[], str]) -> None:
    """`migrate --check` fails, changing nothing, until there is nothing to do."""
    url = create_database()
    engine, settings = open_engine(for_sqlalchemy(url)), {"DATABASE_URL": url}
    done = run_command("migrate", "--check", settings=settings)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the database is empty, revision" in done.stderr
    assert query(engine, TABLES) == [(0,)]
    assert run_command("migrate", settings=settings).returncode == 0
    done = run_command("migrate", "--check", settings=settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_migrate_check_names_both_revisions(create_migrated: Callable[[], str]) -> None:
    """Where the tables are older, both revisions are named in one line; newer ones will do."""
    url = create_migrated()
    older = r"productgraph: the database is at revision 0001, revision \d{4} is needed: .+\n"
    for revision, status, said in (("0001", 1, older), ("9999", 0, "")):
        with connected(open_engine(for_sqlalchemy(url))) as connection:
            update = text("UPDATE alembic_version SET version_num = :revision")
            connection.execute(update, {"revision": revision})
        done = run_command("migrate", "--check", settings={"DATABASE_URL": url})
        assert done.returncode == status
        assert re.fullmatch(said, done.stderr)


def test_migrate_check_creates_no_database(tmp_path: Path) -> None:
    """Where there is no database at all, none is made."""
    done = run_command("migrate", "--check", settings={"DATA_DIR": str(tmp_path / "none")})
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert not (tmp_path / "none").exists()


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A repository of its own with the schema of today."""
    for place in ("protos", "scripts/breaking"):
        copy = shutil.copytree if (ROOT / place).is_dir() else shutil.copy
        (tmp_path / place).parent.mkdir(exist_ok=True)
        copy(ROOT / place, tmp_path / place)
    git("init", "-q", root=tmp_path)
    git("add", "-A", root=tmp_path)
    git(*COMMITTER, "commit", "-q", "-m", "Release", root=tmp_path)
    return tmp_path


def compare(root: Path) -> "subprocess.CompletedProcess[str]":
    """Runs the comparison with the last release."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [root / "scripts/breaking"],
        env={"PATH": path, "HOME": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        ("", "", 0),
        ("string event_id = 1 [", "string event_id = 99 [", 100),
        ('json_name = "session.id"', 'json_name = "sessionId"', 100),
        ("// User session.", "string added = 99; // User session.", 0),
    ],
)
def test_a_breaking_schema_change_is_found(old: str, new: str, status: int, released: Path) -> None:
    """A change of the schema that clients of the last release would notice is found."""
    assert (compare(released).returncode, compare(released).stdout) == (77, "no release tag\n")
    git("tag", "v1.0.0", root=released)
    proto = released / "protos/productgraph/v1/event.proto"
    proto.write_text(proto.read_text().replace(old, new, 1))
    done = compare(released)
    assert done.returncode == status, done.stdout + done.stderr
    assert bool(done.stdout) == bool(status)
