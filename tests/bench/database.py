"""The database of a run: PostgreSQL as `scripts/serve` embeds it, and what only it can do."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg2
from psycopg2.extensions import connection as Connection

from server.storage.connection import connected, open_engine
from server.storage.embedded import EmbeddedPostgres
from server.storage.keys import create_key
from server.storage.migrate import migrate
from server.storage.partitions import add_months
from tests.bench import baseline
from tests.bench.events import PROJECT, NumberedRequest, encode_rows, make_events

COPY_ROWS = 1000
_WARM_UP_SHARE = 0.2


class BenchDatabase:
    """The events table, emptied between measurements, and the API key of the load."""

    def __init__(self, url: str) -> None:
        self.url = url
        engine = open_engine(url)
        migrate(engine)
        with connected(engine) as connection:
            add_months(connection, datetime.now(UTC).date())
            self.key = create_key(connection, PROJECT, "bench")
        self._rows, self._copy = self._prepare_rows()

    def _prepare_rows(self) -> tuple[NumberedRequest, str]:
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

    def execute(self, statement: str, *parameters: object) -> None:
        """Run a statement and commit it."""
        with self._connected() as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)

    def find_postmaster(self) -> int:
        """Return the process from which all of PostgreSQL's processes descend."""
        with self._connected() as connection:
            return int(psutil.Process(connection.info.backend_pid).ppid())

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
        with self._connected() as connection, connection.cursor() as cursor:
            while not is_done(number):
                self._rows.number(number)
                buffer = self._rows.buffer
                cursor.copy_expert(self._copy, BytesIO(buffer), len(buffer))
                number += 1
        return number


@contextmanager
def running_database(directory: Path) -> Iterator[BenchDatabase]:
    """Run an embedded PostgreSQL in this directory. A service with it as DATA_DIR shares it."""
    with EmbeddedPostgres(directory, create=True) as embedded:
        yield BenchDatabase(embedded.url)
