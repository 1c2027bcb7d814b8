"""A PostgreSQL cluster: its files, its processes, its socket.

Root never follows a link in a directory of PostgreSQL's account, which could lead anywhere.
"""

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from server.storage.accounts import Account, EmbeddedPostgresError, find_account
from server.storage.places import find_programs, plain_programs

with suppress(ModuleNotFoundError):  # comes with the extra, as PostgreSQL does
    import psutil  # type: ignore[import-untyped]

NAME = "productgraph"  # the database and its owner
PORT = 5432  # only a part of the socket's name
RECOVERING = "the database system is"  # starting up, in recovery mode, shutting down ...
_SOCKET_PATH_BYTES = 103  # what macOS takes; Linux takes 107
_LOG_BYTES = 16 * 1024 * 1024
_PID_FILE_BYTES = 8192
_STATUS = 7  # the line of the pid file that says what the postmaster does
# As `pg_ctl start` does it, which hands all paths to a shell that expands them.
_IN_BACKGROUND = 'umask 077; log=$1; shift; "$@" </dev/null >>"$log" 2>&1 & echo "$!"'
_START_SECONDS = 5
_STOP_SECONDS = 10

# fsync, full_page_writes and synchronous_commit stay on: what was committed survives a crash.
_SETTINGS = {
    # The socket is all there is, in a directory of mode 0700: whoever gets to it could read the
    # files as well, so that a password (initdb's --auth=trust) would protect nothing.
    "listen_addresses": "",
    "port": str(PORT),
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

_Words = list[str | Path]


class Cluster:
    """The cluster in a data directory. Its callers see to it that they change it one at a time."""

    def __init__(self, directory: Path) -> None:
        self._data = directory
        self.directory = directory / "postgres"
        self._log = self.directory / "server.log"
        self.socket_directory = self._choose_socket_directory()

    def _choose_socket_directory(self) -> Path:
        path = os.fsencode(self.directory / f".s.PGSQL.{PORT}")
        if len(path) <= _SOCKET_PATH_BYTES and b"," not in path:  # libpq splits hosts at commas
            return self.directory
        # Not in TMPDIR, which may differ between the processes that have to meet here.
        digest = hashlib.sha256(path).hexdigest()[:16]
        return Path("/tmp", f"{NAME}-{digest}")  # noqa: S108 - its owner is checked before use

    @cached_property
    def _mark(self) -> str:
        # In the words of each process of this server and of no other: where a container has the
        # same path, the inode differs.
        digest = hashlib.sha256(os.fsencode(self._data)).hexdigest()[:16]
        return f"{NAME}-{self._data.stat().st_ino}-{digest}"

    @cached_property
    def account(self) -> Account:
        """Whose rights PostgreSQL has. Raises EmbeddedPostgresError if there is no such account."""
        return find_account(self.directory)

    @cached_property
    def _programs(self) -> Path:
        return find_programs(self.account)

    def create(self, held: int) -> None:
        """Make the cluster, complete or not at all.

        If this process is killed, a child still has the descriptor `held` for as long as it writes.
        """
        for leftover in self._data.glob("initdb-*"):
            shutil.rmtree(leftover)
        self._require_access()
        draft = tempfile.mkdtemp(prefix="initdb-", dir=self._data)
        os.chown(draft, self.account.uid, self.account.gid)
        # PostgreSQL's own C.UTF-8 sorts alike on every system.
        locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        user = [f"--username={NAME}", "--auth=trust", "--encoding=UTF8"]
        single = ["--single", "-D", draft, "-c", "exit_on_error=on", "template1"]
        with plain_programs(self._programs) as programs:
            self._make(programs / "initdb", "-D", draft, *user, *locale, held=held)
        statement = f"CREATE DATABASE {NAME}"
        self._make(self._programs / "postgres", *single, statement=statement, held=held)
        os.rename(draft, self.directory)
        _sync_directory(self._data)

    def _make(self, program: Path, *words: str, statement: str = "", held: int) -> None:
        result = self.account.run([program, *words], statement, pass_fds=[held])
        if result.returncode != 0:
            raise EmbeddedPostgresError(f"{program.name} failed: {_find_reason(result.stderr)}")

    def start(self) -> bool:
        """Start PostgreSQL if no process of it lives, and tell whether that was so.

        Raises EmbeddedPostgresError if it does not start.
        """
        if self.is_running():
            return False
        self._require_access()
        self._kill_orphans()
        # PostgreSQL believes these two for as long as any process has the number inside.
        (self.directory / "postmaster.pid").unlink(missing_ok=True)
        with self._opened_socket_directory() as descriptor, suppress(FileNotFoundError):
            os.unlink(f".s.PGSQL.{PORT}.lock", dir_fd=descriptor)
        with suppress(FileNotFoundError):
            self._log.rename(self._log.with_suffix(".log.old"))
        place = {"cluster_name": self._mark, "unix_socket_directories": self.socket_directory}
        settings = [f"--{name}={value}" for name, value in (_SETTINGS | place).items()]
        shell: _Words = ["/bin/sh", "-c", _IN_BACKGROUND, "sh", self._log]
        postgres: _Words = [self._programs / "postgres", "-D", self.directory]
        started = self.account.run([*shell, *postgres, *settings])
        self._wait_until_started(int(started.stdout))
        if not self.is_running():
            raise self.describe_failure()
        return True

    def _wait_until_started(self, pid: int) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and _is_alive(pid):
            if self._read_pid_file()[_STATUS:] in (["ready"], ["standby"]):
                return
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop PostgreSQL. A stop that takes more than ten seconds completes by itself."""
        if not self.is_running():
            return
        # Its exit code tells nothing: it fails as well if there is only more to wait for.
        options = ["-t", str(_STOP_SECONDS), "-m", "fast"]
        self.account.run([self._programs / "pg_ctl", "stop", "-D", self.directory, *options])
        if self.socket_directory != self.directory:
            with suppress(OSError):
                self.socket_directory.rmdir()

    def is_running(self) -> bool:
        """Return whether its postmaster lives, be it frozen or recovering."""
        # Negative for a single-user session.
        pid = "".join(self._read_pid_file()[:1]).lstrip("-")
        return pid.isdecimal() and self._is_ours(int(pid))

    def _read_pid_file(self) -> list[str]:
        """Return its lines; none if there is no such file."""
        with self._opened("postmaster.pid") as file:
            text = file.read(_PID_FILE_BYTES).decode(errors="replace") if file else ""
        return [line.strip() for line in text.splitlines()]

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
            self.account.run(["/bin/sh", "-c", 'kill -9 "$@"', "sh", *map(str, orphans)])
        deadline = time.monotonic() + _START_SECONDS
        while any(map(self._is_ours, orphans)) and time.monotonic() < deadline:
            time.sleep(0.01)

    def prepare_socket_directory(self) -> None:
        """Make the socket's directory, if it is not the cluster's own, and make it private."""
        with self._opened_socket_directory():
            pass

    @contextmanager
    def _opened_socket_directory(self) -> Iterator[int]:
        # Its name in /tmp could lead elsewhere a moment later, its descriptor cannot.
        descriptor = (
            os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            if self.socket_directory == self.directory
            else self._open_private_directory(self.socket_directory)
        )
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open_private_directory(self, path: Path) -> int:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        strange = EmbeddedPostgresError(f"{path} is someone else's: remove it")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except (NotADirectoryError, PermissionError):  # the first for a link too
            raise strange from None
        if os.fstat(descriptor).st_uid not in (os.geteuid(), self.account.uid):
            os.close(descriptor)
            raise strange
        os.fchown(descriptor, self.account.uid, self.account.gid)
        os.fchmod(descriptor, 0o700)
        return descriptor

    def _require_access(self) -> None:
        if closed := self.account.find_closed(self._data, self._programs):
            raise EmbeddedPostgresError(
                f"PostgreSQL refuses to run as root, and the account {self.account.name}, which it"
                f" runs as instead, may not enter {closed}: allow that (chmod o+x), or set DATA_DIR"
                " to another directory, or run as another user"
            )

    def describe_failure(self) -> EmbeddedPostgresError:
        """Return why PostgreSQL has not started, by its own log."""
        with self._opened("server.log") as file:
            log = file.read().decode(errors="replace") if file else ""
        return EmbeddedPostgresError(
            f"PostgreSQL does not start: {_find_reason(log)} (see {self._log})"
        )

    def bound_log(self) -> None:
        """Empty the log if it is too long: the server appends, and goes on at the new end."""
        with self._opened("server.log", os.O_WRONLY) as file:
            if file and os.fstat(file.fileno()).st_size > _LOG_BYTES:
                os.ftruncate(file.fileno(), 0)

    @contextmanager
    def _opened(self, name: str, access: int = os.O_RDONLY) -> Iterator[BinaryIO | None]:
        """Yield a file that PostgreSQL has written, or None if there is no such file.

        What its account may have put in its place is none: a link of either kind, a pipe.
        """
        try:
            path = self.directory / name
            descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            yield None
            return
        with open(descriptor, "rb" if access == os.O_RDONLY else "wb", closefd=True) as file:
            status = os.fstat(descriptor)
            is_genuine = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            yield file if is_genuine else None


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _find_reason(output: str) -> str:
    lines = output.strip().splitlines() or ["for an unknown reason"]
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
    return next((line for line in fatal if RECOVERING not in line), lines[-1])


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
