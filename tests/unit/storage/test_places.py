"""Root's PostgreSQL, which runs as another account, gets data and programs that it can reach."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg2
import pytest

from server.storage import places
from server.storage.accounts import EmbeddedPostgresError
from server.storage.embedded import EmbeddedPostgres
from server.storage.places import locate_data, require_package
from tests.support.services import ROOT, clean_environment, run_command

pytestmark = [
    pytest.mark.slow,  # most have the whole life of a database
    pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL is another's"),
]

# Runs a command on a machine, as far as it can see, without the accounts postgres and nobody.
WITHOUT_ACCOUNTS = """
set -e
mount -t tmpfs none /mnt
cp -a /etc /mnt/etc
sed -i -e /^postgres:/d -e /^nobody:/d /mnt/etc/passwd
sed -i "s/^passwd:.*/passwd: files/" /mnt/etc/nsswitch.conf
mount --bind /mnt/etc /etc
{}
exec "$@"
"""


@pytest.fixture
def closed() -> Iterator[Path]:
    """Provide a directory that no other account may enter."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, open_directory: Path) -> Iterator[Path]:
    """Provide what stands for /var/lib/productgraph, and is empty."""
    with tempfile.TemporaryDirectory(dir=open_directory) as directory:
        home = Path(directory, "home")
        Path(directory).chmod(0o711)
        monkeypatch.setattr(places, "_HOME", home)
        yield home


def count_databases(directory: Path) -> int:
    """How many databases PostgreSQL has in a data directory; it makes one if it has to."""
    with EmbeddedPostgres(directory, create=True) as server:
        connection = psycopg2.connect(server.url)
        cursor = connection.cursor()
        cursor.execute("SELECT count(*) FROM pg_database")
        row = cursor.fetchone()
        connection.close()
        assert row is not None
        return int(row[0])


def test_closed_data_goes_where_it_can(closed: Path, home: Path) -> None:
    """Data whose usual place is closed goes below the home, and PostgreSQL runs on it."""
    place = locate_data(closed / "data", create=True)
    assert place.parent == home
    assert count_databases(place) == 4
    assert not (closed / "data").exists()


@pytest.mark.usefixtures("home")
def test_located_data_is_found_again(closed: Path) -> None:
    """Data that is below the home stays there when its usual place is opened, for all commands."""
    place = locate_data(closed / "data", create=True)
    count_databases(place)
    closed.chmod(0o711)
    assert locate_data(closed / "data", create=True) == place
    assert locate_data(closed / "data", create=False) == place


def test_clones_never_share_data(closed: Path, home: Path) -> None:
    """Each usual place has a directory of its own, even if their names differ in signs alone."""
    names = ("a b", "a-b", "a_b", "a/b", "b", "x" * 200)
    found = {locate_data(closed / name / "data", create=True) for name in names}
    assert len(found) == len(names)
    assert all(path.parent == home and len(path.name) <= 45 for path in found)


@pytest.mark.usefixtures("home")
def test_existing_data_keeps_precedence(open_directory: Path) -> None:
    """Data at the usual place is used there, closed or not."""
    clone = open_directory / "clone"
    count_databases(clone / "data")
    clone.chmod(0o700)
    assert locate_data(clone / "data", create=True) == clone / "data"
    with pytest.raises(EmbeddedPostgresError, match=rf"may not enter {clone}:"):
        count_databases(clone / "data")


@pytest.mark.usefixtures("home")
def test_data_in_an_open_place_stays_there(open_directory: Path) -> None:
    """Data whose usual place is open goes there."""
    assert locate_data(open_directory / "new" / "data", create=True) == open_directory / "new/data"


def test_umask_closes_no_data(open_directory: Path) -> None:
    """A data directory below missing ones can be entered even with umask 077."""
    umask = os.umask(0o077)
    try:
        assert count_databases(open_directory / "deep" / "er" / "data") == 4
    finally:
        os.umask(umask)


def copy_package(place: Path) -> None:
    """Copy what is installed of PostgreSQL, readable for its owner alone."""
    package = require_package()
    for path in package.parent.glob(f"{package.name}*"):
        shutil.copytree(path, place / path.name, symlinks=True)
    subprocess.run(["chmod", "-R", "go=", str(place)], check=True)


def test_closed_programs_are_copied(
    monkeypatch: pytest.MonkeyPatch, closed: Path, home: Path, open_directory: Path
) -> None:
    """Programs that the account cannot reach are copied: it can run them but not change them."""
    copy_package(closed)
    monkeypatch.syspath_prepend(closed)
    assert count_databases(open_directory / "elsewhere") == 4
    [programs] = home.iterdir()
    copies = [programs, *programs.rglob("*")]
    assert {path.lstat().st_uid for path in copies} == {0}
    writable = stat.S_IWGRP | stat.S_IWOTH
    assert not [path for path in copies if not path.is_symlink() and path.stat().st_mode & writable]


def test_unreadable_programs_are_copied(
    monkeypatch: pytest.MonkeyPatch, open_directory: Path, home: Path
) -> None:
    """Programs on an open way, but installed with umask 077, are copied as well."""
    place = open_directory / "site"
    place.mkdir()
    copy_package(place)
    place.chmod(0o711)
    monkeypatch.syspath_prepend(place)
    with EmbeddedPostgres(open_directory / "with-umask", create=True):
        pass
    assert list(home.iterdir())


def run_without_accounts(directory: Path, change: str = "") -> "subprocess.CompletedProcess[str]":
    """Migrate the database in a directory on a machine without accounts for PostgreSQL."""
    script = WITHOUT_ACCOUNTS.format(change)
    command = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounts cannot be made here")
    return subprocess.run(
        [*command, sys.executable, "-m", "server", "migrate"],
        cwd=ROOT,
        env=clean_environment({"DATA_DIR": str(directory)}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_missing_account_is_made(open_directory: Path) -> None:
    """A machine with neither the account postgres nor nobody gets one of our own."""
    done = run_without_accounts(open_directory / "unowned")
    assert done.returncode == 0, done.stderr
    uid = (open_directory / "unowned" / "postgres").stat().st_uid
    assert 0 < uid < 1000


def test_forbidden_account_is_explained(open_directory: Path) -> None:
    """Where no account can be made, one line says what to do."""
    done = run_without_accounts(
        open_directory / "refused", "mount -t tmpfs -o ro none /usr/sbin; rm -f /etc/.pwd.lock"
    )
    [line] = [line for line in done.stderr.splitlines() if line.startswith("productgraph: ")]
    assert "useradd --system" in line
    assert "DATABASE_URL" in line
    assert not (open_directory / "refused").exists()


def test_nameless_user_is_explained(closed: Path) -> None:
    """A user id without an account is told that PostgreSQL cannot run, and what to do."""
    unshare = ["unshare", "--user", "--map-user=12345"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("user ids cannot be mapped here")
    done = subprocess.run(
        [*unshare, sys.executable, "-m", "server", "migrate"],
        cwd=ROOT,
        env=clean_environment({"DATA_DIR": str(closed / "data")}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("productgraph: PostgreSQL cannot run as user id 12345")
    assert "DATABASE_URL" in done.stderr
    assert not (closed / "data").exists()


def test_every_command_finds_the_data(closed: Path) -> None:
    """What `migrate` has made below /var/lib, `keys` finds, from any directory."""
    settings = {"PRODUCTGRAPH_DEFAULT_DATA_DIR": str(closed / "data")}
    with ExitStack() as stack:
        place = locate_data(closed / "data", create=True)
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        assert place.parent == Path("/var/lib/productgraph")
        for command in ("migrate", "keys create --project p --name n", "keys list"):
            done = run_command(*command.split(), settings=settings)
            assert done.returncode == 0, done.stderr
        assert "p " in done.stdout


def test_set_directory_is_never_moved(closed: Path) -> None:
    """A DATA_DIR that the user has set is refused if it is closed, and not replaced."""
    done = run_command("migrate", settings={"DATA_DIR": str(closed / "data")})
    assert done.returncode == 1
    assert f"may not enter {closed}:" in done.stderr


@pytest.mark.usefixtures("home")
def test_programs_keep_their_place(open_directory: Path) -> None:
    """Programs that the account can reach are run where they are."""
    site = open_directory / "open-site"
    site.mkdir()
    copy_package(site)
    subprocess.run(["chmod", "-R", "a+rX", str(site)], check=True)
    script = "from server.storage.accounts import find_account\n"
    script += "from server.storage.places import find_programs\nfrom pathlib import Path\n"
    script += "print(find_programs(find_account(Path('/nowhere'))))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment({}) | {"PYTHONPATH": f"{site}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(site)
