"""An embedded PostgreSQL: created, started, shared between processes, restarted and stopped.

Inside the data directory:
    postgres/       the cluster, with its log and its socket; it appears complete or not at all
    initdb-*/       a cluster in the making, or what a killed process left of one
    users.lock      held shared by every process that uses the server
    changes.lock    held exclusively while the server is created, started or stopped
"""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import quote

import psycopg2

from server.storage.accounts import EmbeddedPostgresError
from server.storage.cluster import NAME, PORT, RECOVERING, Cluster
from server.storage.locks import SharedUse, locked
from server.storage.places import make_directory, require_package

_SILENCE_SECONDS = 60

_log = logging.getLogger("productgraph")


class EmbeddedPostgres:
    """This process's use of the PostgreSQL in a data directory, which other processes share.

    With `create`, opening it makes a missing data directory. Not for use by several threads.
    """

    def __init__(self, directory: Path, *, create: bool) -> None:
        self._directory = directory.resolve()
        self._create = create
        self._cluster = Cluster(self._directory)
        self._changes = self._directory / "changes.lock"
        self._use = SharedUse(self._directory / "users.lock")

    @property
    def url(self) -> str:
        """The database's URL, as libpq takes it."""
        # The port is there because a PGPORT in the environment would be believed instead.
        host = quote(str(self._cluster.socket_directory))
        return f"postgresql://{NAME}@/{NAME}?host={host}&port={PORT}"

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
        if not self._use.joined:
            return False
        with self._translate_errors():
            self._cluster.bound_log()
            if self._cluster.is_running():
                return False
            # Whoever has the lock is starting it.
            with suppress(BlockingIOError), locked(self._changes, wait=False):
                return self._cluster.start()
        return False

    def close(self) -> None:
        """End this process's use, and stop PostgreSQL if no other process uses it. Idempotent.

        A stop that takes more than ten seconds completes by itself.
        """
        if not self._use.joined:
            return
        self._use.leave()
        with locked(self._changes):
            if self._use.is_deserted():
                self._cluster.stop()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require_presence(self) -> None:
        if not self._create and not self._cluster.directory.exists():
            raise EmbeddedPostgresError(
                f"there is no database in {self._directory}: set DATABASE_URL, or set DATA_DIR to a"
                " directory that `productgraph serve` or `productgraph migrate` has made"
            )

    def _join(self) -> None:
        require_package()
        assert self._cluster.account  # there is one, before anything is made
        make_directory(self._directory)
        with locked(self._changes) as changes:
            self._use.join()
            if not self._cluster.directory.exists():
                _log.info("creating a database", extra={"directory": str(self._directory)})
                self._cluster.create(changes)
                _log.info("database created")
            self._cluster.prepare_socket_directory()

    def _wait_until_answering(self) -> None:
        deadline = time.monotonic() + _SILENCE_SECONDS
        started = False
        while problem := self._find_query_problem():
            if RECOVERING in problem and "shutting down" not in problem:
                deadline = time.monotonic() + _SILENCE_SECONDS  # it recovers, and says so
            elif time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"PostgreSQL does not answer: {problem}")
            elif started and not self._cluster.is_running():
                raise self._cluster.describe_failure()
            else:
                started = self.ensure_running() or started
            time.sleep(0.05)

    def _find_query_problem(self) -> str | None:
        try:
            connection = psycopg2.connect(
                host=str(self._cluster.socket_directory),
                port=PORT,
                user=NAME,
                dbname=NAME,
                connect_timeout=2,
            )
            with closing(connection):
                connection.cursor().execute("SELECT 1")
        except psycopg2.Error as error:
            return " ".join(str(error).split())
        return None

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EmbeddedPostgresError(f"DATA_DIR {self._directory}: {error}") from error
