"""A new version takes over from the one before it without an interruption."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from server.forwarding.providers.provider import CURRENT_MAPPING_VERSION
from server.storage.connection import connected, open_engine
from tests.support.clients import accepted, open_tenant
from tests.support.events import to_message
from tests.support.forwarding import SECRET, Bench, make_events
from tests.support.provider_servers import AmplitudeServer, MixpanelServer
from tests.support.services import (
    ROOT,
    query,
    run_command,
    running_service,
    wait_until,
)

POSTPONED = "SELECT count(*) FROM outbox_deliveries WHERE attempts > 0 AND due_at > now()"
TABLES = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"


def git(*arguments: str, root: Path = ROOT) -> bytes:
    """Return what git prints; skip the test if it fails."""
    if not shutil.which("git"):
        pytest.skip("git is missing")
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no history here: {done.stderr.decode().strip()}")
    return done.stdout


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the code from before the newest migration."""
    newest = max((ROOT / "server/migrations/versions").glob("[0-9]*.py")).relative_to(ROOT)
    added = git("log", "--diff-filter=A", "--format=%H", "-1", "--", str(newest)).decode().strip()
    root = tmp_path_factory.mktemp("previous")
    archive = git("archive", f"{added}^" if added else "HEAD", "server", "gen")
    subprocess.run(["tar", "-x", "-C", str(root)], input=archive, check=True)
    assert not (root / newest).exists()
    return root


@pytest.mark.slow
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
        newer = stack.enter_context(open_tenant(new))
        tenants = [replace(newer, service=old), newer]
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


@pytest.mark.slow
def test_an_older_forwarder_leaves_newer_payloads_waiting(
    previous: Path, create_migrated: Callable[[], str]
) -> None:
    """On the newest tables the previous version forwards what it can map, and leaves the rest."""
    source = (previous / "server/forwarding/providers/provider.py").read_text()
    found = re.search(r"^CURRENT_MAPPING_VERSION = (\d+)", source, re.MULTILINE)
    assert found
    known = int(found[1])
    with AmplitudeServer(SECRET) as amplitude, MixpanelServer(SECRET) as mixpanel:
        bench = Bench(create_migrated(), {"amplitude": amplitude, "mixpanel": mixpanel})
        for project, version in (("newer", known + 1), ("older", known)):
            bench.store(make_events(project, 3))
            update = "UPDATE outbox_payloads SET mapping_version = %s WHERE project_id = %s"
            bench.query(update, version, project)
        with bench.process(root=previous):
            wait_until(lambda: all(len(s.insert_ids) == 3 for s in bench.servers.values()))
            wait_until(lambda: bench.query(POSTPONED) == [(2,)])
        bench.check()
        assert bench.query("SELECT count(*) FROM dead_events") == [(0,)]
        assert bench.query("SELECT DISTINCT project_id FROM outbox_payloads") == [("newer",)]
        bench.query("UPDATE outbox_payloads SET mapping_version = %s", CURRENT_MAPPING_VERSION)
        bench.query("UPDATE outbox_deliveries SET due_at = now()")
        with bench.process():
            bench.finish()


def test_migrate_check_fails_until_nothing_is_to_do(create_database: Callable[[], str]) -> None:
    """`migrate --check` fails, changing nothing, until there is nothing to do."""
    url = create_database()
    engine, settings = open_engine(url), {"DATABASE_URL": url}
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
        with connected(open_engine(url)) as connection:
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
def copied(tmp_path: Path) -> Path:
    """Return a repository of its own with the schema of today and of the last release."""
    for place in ("protos", "scripts/breaking", "gen/released.binpb"):
        copy = shutil.copytree if (ROOT / place).is_dir() else shutil.copy
        (tmp_path / place).parent.mkdir(exist_ok=True)
        copy(ROOT / place, tmp_path / place)
    return tmp_path


def compare(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the comparison with the last release."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [root / "scripts/breaking", *arguments],
        env={"PATH": path, "HOME": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


EVENT, SERVICE = "event.proto", "event_ingestion_service.proto"


@pytest.mark.parametrize(
    ("file", "old", "new", "status"),
    [
        (EVENT, "", "", 0),
        (EVENT, "string event_id = 1 [", "string added = 99;\nstring event_id = 1 [", 0),
        (EVENT, "string event_id = 1 [", "string event_id = 99 [", 100),
        (EVENT, "string event_id = 1 [", "bytes event_id = 1 [", 100),
        (EVENT, 'json_name = "session.id"', 'json_name = "sessionId"', 100),
        (EVENT, 'optional string page_path = 9 [json_name = "page.path"];', "", 100),
        (SERVICE, "rpc IngestEvents(", "rpc SendEvents(", 100),
        (SERVICE, "service EventIngestionService", "service IngestionService", 100),
        (SERVICE, "int32 index = 1;", "string index = 1;", 100),
    ],
)
def test_a_breaking_schema_change_is_found(
    file: str, old: str, new: str, status: int, copied: Path
) -> None:
    """A change that clients of the last release would notice, on the wire or in JSON, is found."""
    proto = copied / "protos/productgraph/v1" / file
    assert old in proto.read_text()
    proto.write_text(proto.read_text().replace(old, new, 1))
    done = compare(copied)
    assert done.returncode == status, done.stdout + done.stderr
    assert bool(done.stdout) == bool(status)


def test_a_release_is_what_changes_are_compared_with(copied: Path) -> None:
    """What scripts/breaking --release writes is the schema of the moment, and it alone."""
    proto = copied / "protos/productgraph/v1" / EVENT
    text = proto.read_text()
    proto.write_text(text.replace("string event_id = 1 [", "string event_id = 99 [", 1))
    assert compare(copied, "--release").returncode == 0
    assert compare(copied).returncode == 0
    proto.write_text(text)
    assert compare(copied).returncode == 100


def test_the_changelog_knows_the_version_of_the_package() -> None:
    """The newest version in CHANGELOG.md, with its date, is that of pyproject.toml."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    released = re.findall(
        r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert released[0] == version
