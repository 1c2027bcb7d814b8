"""The database of a run: PostgreSQL as `scripts/serve` embeds it, and what only it can do."""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg2
from psycopg2.extensions import connection as Connection

from server.storage.citus import is_distributed
from server.storage.connection import connected, open_engine
from server.storage.embedded import EmbeddedPostgres
from server.storage.keys import create_key
from server.storage.migrate import migrate
from server.storage.partitions import add_months
from tests.bench import baseline
from tests.bench.events import PROJECT, NumberedRequest, encode_rows, make_events

COPY_ROWS = 1000
_FIND_POSTMASTER = "SELECT split_part(pg_read_file('postmaster.pid'), chr(10), 1)"
_FIND_ALL_POSTMASTERS = f"""
SELECT result FROM run_command_on_all_nodes($${_FIND_POSTMASTER}$$)
"""
_DELETE_KEYS = """
WITH deleted AS (DELETE FROM api_keys WHERE name = %s RETURNING id)
DELETE FROM api_key_uses USING deleted WHERE key_id = id
"""
_WARM_UP_SHARE = 0.2


class BenchDatabase:
    """The events table, emptied between measurements, and the API keys of the loads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = open_engine(url)
        self._key_name = f"bench {secrets.token_hex(8)}"

    def prepare(self) -> None:
        """Make the tables and the partitions of today."""
        migrate(self._engine)
        with connected(self._engine) as connection:
            add_months(connection, datetime.now(UTC).date())

    @cached_property
    def key(self) -> str:
        """Return the key of a load of one project."""
        [key] = self.create_keys([PROJECT])
        return key

    def create_keys(self, projects: Sequence[str]) -> list[str]:
        """Create a key for each of these projects."""
        with connected(self._engine) as connection:
            return [create_key(connection, project, self._key_name) for project in projects]

    def delete_keys(self) -> None:
        """Delete the keys that were created here, and what is known of their use."""
        self.execute(_DELETE_KEYS, self._key_name)

    @cached_property
    def _prepared(self) -> tuple[NumberedRequest, str]:
        """Return COPY's lines of the events, and its statement."""
        asyncio.run(baseline.store(self.url, make_events(COPY_ROWS)))
        columns = ", ".join(baseline.COLUMNS)
        lines = BytesIO()
        with self._connected() as connection, connection.cursor() as cursor:
            query = f"SELECT {columns} FROM events ORDER BY event_sequence"
            cursor.copy_expert(f"COPY ({query}) TO STDOUT", lines)
        self.empty()
        rows = encode_rows(lines.getvalue(), COPY_ROWS)
        return rows, f"COPY events ({columns}) FROM STDIN"

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        with closing(psycopg2.connect(self.url)) as connection:
            connection.autocommit = True
            connection.cursor().execute("SET TimeZone TO 'UTC'")
            yield connection

    def execute(self, statement: str, *parameters: object, **named: object) -> None:
        """Run a statement and commit it."""
        with self._connected() as connection, connection.cursor() as cursor:
            cursor.execute(statement, named or parameters)

    def find_postmasters(self) -> list[int]:
        """Return the process of each node from which all of PostgreSQL's descend.

        Raises ValueError if one is not on this machine.
        """
        found = self.query(_FIND_ALL_POSTMASTERS if self.is_distributed else _FIND_POSTMASTER)
        pids = [int(pid) for (pid,) in found]
        for pid in pids:
            if not psutil.pid_exists(pid) or psutil.Process(pid).name() != "postgres":
                raise ValueError("the database must be on this machine: its CPU time is read here")
        return pids

    @cached_property
    def is_distributed(self) -> bool:
        """Return whether its events are on the nodes of Citus."""
        with connected(self._engine) as connection:
            return is_distributed(connection)

    def query(self, statement: str, *parameters: object) -> list[Any]:
        """Return the rows of a statement, committed."""
        with self._connected() as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall()

    def read_version(self) -> str:
        """Return PostgreSQL's version."""
        with self._connected() as connection, connection.cursor() as cursor:
            cursor.execute("SHOW server_version")
            return str(cursor.fetchone()[0])  # type: ignore[index]

    def count_events(self) -> int:
        """Return the number of stored events."""
        with self._connected() as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM events")
            return int(cursor.fetchone()[0])  # type: ignore[index]

    def empty(self) -> None:
        """Empty the table, and leave nothing of its rows to be written."""
        with self._connected() as connection, connection.cursor() as cursor:
            cursor.execute("TRUNCATE events")
            cursor.execute("CHECKPOINT")

    def measure_copy(self, seconds: float, first_number: int) -> tuple[float, int]:
        """Return how many prepared rows a second COPY commits over one connection, 1,000 each time.

        It goes into the table as the service does, key, partitions and fsync included. Returns the
        next number too.
        """
        ends_at = time.perf_counter() + seconds * _WARM_UP_SHARE
        number = self._copy_until(first_number, lambda _: time.perf_counter() >= ends_at)
        started_at = time.perf_counter()
        end = self._copy_until(number, lambda _: time.perf_counter() >= started_at + seconds)
        elapsed = time.perf_counter() - started_at
        self.empty()
        return (end - number) * COPY_ROWS / elapsed, end

    def fill(self, rows: int, first_number: int, on_progress: Callable[[int], None]) -> int:
        """Store this many rows, in steps of 1,000. Return the next number."""
        last = first_number + rows // COPY_ROWS

        def is_done(number: int) -> bool:
            on_progress((number - first_number) * COPY_ROWS)
            return number >= last

        end = self._copy_until(first_number, is_done)
        with self._connected() as connection, connection.cursor() as cursor:
            cursor.execute("VACUUM ANALYZE events")
            cursor.execute("CHECKPOINT")
        return end

    def _copy_until(self, number: int, is_done: Callable[[int], bool]) -> int:
        rows, copy = self._prepared
        with self._connected() as connection, connection.cursor() as cursor:
            while not is_done(number):
                rows.number(number)
                buffer = rows.buffer
                cursor.copy_expert(copy, BytesIO(buffer), len(buffer))
                number += 1
        return number


@contextmanager
def running_database(directory: Path) -> Iterator[BenchDatabase]:
    """Run an embedded PostgreSQL in this directory. A service with it as DATA_DIR shares it."""
    with EmbeddedPostgres(directory, create=True) as embedded:
        database = BenchDatabase(embedded.url)
        database.prepare()
        yield database


@contextmanager
def borrowed_database(url: str) -> Iterator[BenchDatabase]:
    """Use a database that has no events, and leave none. Raises ValueError if it has some."""
    database = BenchDatabase(url)
    [(has_table,)] = database.query("SELECT to_regclass('events') IS NOT NULL")
    if has_table and database.query("SELECT FROM events LIMIT 1"):
        raise ValueError("--database-url: the database has events, which this would delete")
    try:
        database.prepare()
        yield database
    finally:
        database.empty()
        database.delete_keys()
