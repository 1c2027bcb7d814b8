"""No setting of a role, a database, the environment or a pooler changes what is stored."""

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from sqlalchemy import make_url

from server.errors import Unavailable
from server.storage.connection import Engine, connected, open_engine
from server.storage.events import EventStore
from server.storage.migrate import UnsuitableDatabase, check_migrated, migrate
from server.storage.partitions import add_months
from tests.support.events import ENCODER, make_row
from tests.support.services import wait_until

TEXTS = {"event_name": "café 漢字 \\ ' \\n", "metadata": {"key": "naïve \\"}}
STORED = "SELECT event_name, metadata, event_timestamp::text FROM public.events"
EXPECTED = [("café 漢字 \\ ' \\n", {"key": "naïve \\"}, "2024-02-01 00:00:00.000001+00")]
FIRST_OF_FEBRUARY = 1_706_745_600
DECOY = "CREATE SCHEMA other; CREATE TABLE other.events (LIKE public.events INCLUDING ALL)"
ODD = {
    "client_encoding": "LATIN1",
    "datestyle": "SQL, DMY",
    "timezone": "Pacific/Kiritimati",
    "standard_conforming_strings": "off",
    "search_path": "other",
    "lc_messages": "de_DE.UTF-8",
    "default_transaction_isolation": "serializable",
    "bytea_output": "escape",
    "quote_all_identifiers": "on",
    "synchronous_commit": "off",
}


@pytest.fixture
def url(create_migrated: Callable[[], str]) -> str:
    """Return a database of its own, with another table `events` in a schema `other`."""
    url = create_migrated()
    execute(url, DECOY)
    return url


def execute(url: str, statement: str) -> list[Any]:
    """Run a statement with settings that are as they should be; return its rows."""
    options = "-c search_path=public -c client_encoding=UTF8 -c timezone=UTC -c datestyle=ISO"
    writable = "-c default_transaction_read_only=off"
    with closing(psycopg2.connect(url, options=f"{options} {writable}")) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


def set_for_role(url: str, name: str, value: str) -> None:
    """Give the role of the tests a setting in this database."""
    database = make_url(url).database
    try:
        execute(url, f"ALTER ROLE CURRENT_USER IN DATABASE {database} SET {name} = '{value}'")
    except psycopg2.errors.InvalidParameterValue as problem:
        pytest.skip(f"this server has no {name} {value}: {problem}")


def save(engine: Engine) -> None:
    """Store the event, and once more as a duplicate."""
    row = make_row("p", "e", seconds=FIRST_OF_FEBRUARY, nanos=1000, **TEXTS)
    with connected(engine) as connection:
        store = EventStore(ENCODER.columns)
        for _ in range(2):
            store.save(connection, [row], 30)


def check_stored(url: str) -> None:
    """Check that the event is stored as it was, once, in the right table."""
    assert execute(url, STORED) == EXPECTED
    assert execute(url, "SELECT count(*) FROM other.events") == [(0,)]


@pytest.mark.parametrize(("name", "value"), ODD.items())
def test_a_setting_of_the_role_changes_no_event(name: str, value: str, url: str) -> None:
    """What is stored does not depend on the settings of the role or database."""
    set_for_role(url, name, value)
    save(open_engine(url))
    check_stored(url)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PGCLIENTENCODING", "LATIN1"),
        ("PGDATESTYLE", "SQL, DMY"),
        ("PGTZ", "Pacific/Kiritimati"),
        ("PGOPTIONS", "-c search_path=other -c standard_conforming_strings=off"),
    ],
)
def test_a_variable_of_libpq_changes_no_event(
    name: str, value: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored does not depend on libpq's variables in the environment."""
    monkeypatch.setenv(name, value)
    save(open_engine(url))
    monkeypatch.undo()
    check_stored(url)


def test_partitions_begin_at_midnight_utc_whatever_the_role(url: str) -> None:
    """Neither the date style nor the time zone of the role moves a partition's bounds."""
    for name in ("datestyle", "timezone", "search_path"):
        set_for_role(url, name, ODD[name])
    engine = open_engine(url)
    with connected(engine) as connection:
        add_months(connection, date(2024, 2, 15))
    save(engine)
    check_stored(url)
    assert execute(url, "SELECT tableoid::regclass::text FROM events") == [("events_2024_02",)]


def test_a_role_that_may_only_read_gets_no_acknowledgement(url: str) -> None:
    """A role whose transactions are read-only by default stores nothing, and is not overruled."""
    set_for_role(url, "default_transaction_read_only", "on")
    with pytest.raises(Unavailable):
        save(open_engine(url))
    assert execute(url, STORED) == []


@contextmanager
def pgbouncer(url: str, directory: Path, mode: str = "transaction") -> Iterator[str]:
    """Provide a PgBouncer whose clients share one connection."""
    program = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    place = make_url(url)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    directory.mkdir()
    host = place.query.get("host", place.host)
    server = f"host={host} port={place.query.get('port', place.port or 5432)}"
    (directory / "users").write_text('"productgraph" ""\n')
    (directory / "pgbouncer.ini").write_text(
        f"""[databases]
{place.database} = {server} user=productgraph
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {directory / "users"}
pool_mode = {mode}
default_pool_size = 1
"""
    )
    command = [program, str(directory / "pgbouncer.ini")]
    if os.geteuid() == 0:  # as the owner of the database's socket, which nobody else may use
        owner = pwd.getpwuid(Path(str(host)).stat().st_uid).pw_name
        for path in (directory, *directory.iterdir()):
            shutil.chown(path, owner)
        command[1:1] = ["-u", owner]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        through = f"postgresql://productgraph@127.0.0.1:{port}/{place.database}"
        try:
            wait_until(lambda: answers(through))
            yield through
        finally:
            process.kill()


def answers(url: str) -> bool:
    """Whether a database takes a connection."""
    with suppress(psycopg2.OperationalError), closing(psycopg2.connect(url)):
        return True
    return False


def test_a_pooled_neighbour_changes_no_event(url: str, open_directory: Path) -> None:
    """What another client sets in a shared connection of PgBouncer does not reach our events."""
    name = make_url(url).database
    with (
        pgbouncer(url, open_directory / f"pgbouncer-{name}") as through,
        closing(psycopg2.connect(through)) as neighbour,
    ):
        neighbour.autocommit = True
        for setting in ("client_encoding", "datestyle", "timezone", "search_path"):
            neighbour.cursor().execute(f"SET {setting} = '{ODD[setting]}'")
        neighbour.cursor().execute("SET standard_conforming_strings = off")
        neighbour.cursor().execute("CREATE TEMP TABLE events (LIKE public.events)")
        save(open_engine(through))
    check_stored(url)


@pytest.mark.parametrize("use", [migrate, check_migrated])
def test_a_pooler_that_shares_statements_is_refused(
    use: Callable[[Engine], None], url: str, open_directory: Path
) -> None:
    """Before anything is stored behind a PgBouncer in statement mode, an error says what to set."""
    directory = open_directory / f"statements-{make_url(url).database}"
    with (
        pgbouncer(url, directory, "statement") as through,
        pytest.raises(UnsuitableDatabase, match="set its pool_mode to transaction or session"),
    ):
        use(open_engine(through))
