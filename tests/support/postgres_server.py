"""A PostgreSQL server that a test runs by itself, of any version and with any settings."""

import os
import signal
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg2

from server.storage.accounts import Account
from server.storage.cluster import _SETTINGS, NAME, PORT
from tests.support.patience import PATIENCE
from tests.support.services import wait_until

_OWN_SETTINGS = {"shared_buffers": "64MB", "max_wal_size": "1GB"}
_WAIT_SECONDS = 30.0 * PATIENCE


def find_processes(directory: Path) -> list[psutil.Process]:
    """Return the processes of the PostgreSQL there, the postmaster first; none if it is dead."""
    try:
        words = (directory / "postmaster.pid").read_text().split()
        postmaster = psutil.Process(abs(int(words[0])))
        if postmaster.name() != "postgres":
            return []
        return [postmaster, *postmaster.children(recursive=True)]
    except (OSError, IndexError, ValueError, psutil.Error):
        return []


class PostgresServer:
    """A server with a socket in its directory, to which `account` can write beside it too.

    `environment` is of its programs.
    """

    def __init__(
        self,
        directory: Path,
        programs: Path,
        account: Account,
        settings: Mapping[str, str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.log = directory.with_suffix(".log")
        self._programs = programs
        self._account = account
        self._settings = settings
        self._environment = environment or {}

    @property
    def url(self) -> str:
        """The URL of its database."""
        return f"postgresql://{NAME}@/{NAME}?host={self.directory}&port={PORT}"

    def create(self, *options: str) -> None:
        """Make it, with an empty database, and start it."""
        user = [f"--username={NAME}", "--auth=trust", "--encoding=UTF8"]
        self.run("initdb", "-D", self.directory, *user, *options)
        self.start()
        self.query(f"CREATE DATABASE {NAME}", database="postgres")

    def start(self) -> None:
        """Start it, and return when it answers."""
        # A copy has that of its original, which lives on.
        (self.directory / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)
        place = {"unix_socket_directories": str(self.directory)}
        settings = _SETTINGS | _OWN_SETTINGS | place | dict(self._settings)
        words = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        self.run("pg_ctl", "start", "-w", "-D", self.directory, "-l", self.log, "-o", words)

    def promote(self) -> None:
        """Make a standby a primary, and return when it is one."""
        self.run("pg_ctl", "promote", "-w", "-D", self.directory)

    def kill(self) -> None:
        """End it without warning, frozen or not."""
        processes = self.find_processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes, _WAIT_SECONDS)

    def find_processes(self) -> list[psutil.Process]:
        """Return its processes, the postmaster first; none if it is dead."""
        return find_processes(self.directory)

    def query(self, statement: str, *, database: str = NAME) -> list[Any]:
        """Run a statement without a transaction."""
        connection = psycopg2.connect(self.url, dbname=database, connect_timeout=5)
        with closing(connection), connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def configure(self, name: str, value: str) -> None:
        """Change a setting of the running server."""
        self.query(f"ALTER SYSTEM SET {name} = '{value}'")
        self.query("SELECT pg_reload_conf()")
        wait_until(lambda: self.query(f"SHOW {name}") == [(value,)], _WAIT_SECONDS)

    def run(self, program: str, *words: str | Path) -> None:
        """Run one of PostgreSQL's programs to its end."""
        changes = [f"{name}={value}" for name, value in self._environment.items()]
        done = self._account.run(["/usr/bin/env", *changes, self._programs / program, *words])
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"


def make_room(directory: Path, account: Account) -> Path:
    """Make a directory for servers of that account."""
    directory.mkdir(exist_ok=True)
    if os.geteuid() == 0:
        os.chown(directory, account.uid, account.gid)
    return directory
