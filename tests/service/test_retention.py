"""Old events go, by whole months where they can, and nothing else is touched."""

import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial

import psycopg2
import pytest
from psycopg2.extensions import connection as Connection
from sqlalchemy import text

from server.storage.connection import Engine, GuardedConnection, connected, open_engine
from server.storage.partitions import add_months
from server.storage.rejected_events import Rejection, insert_rejections
from server.storage.retention import delete_expired_rows, drop_partition, list_expired_partitions
from tests.support.clients import Tenant, accepted
from tests.support.load import STORED, read_stored, running_load
from tests.support.projects import create_project
from tests.support.services import (
    Service,
    query,
    run_command,
    running_service,
    wait_until,
)

NOW = datetime.now(UTC)
# A month that lies entirely before what is kept, one that does so in part, and this one.
OLD, PART, NEW = (NOW - timedelta(days=days) for days in (95, 30, 0))
KEEP = "30d"
LONGEST_SECONDS = 3.0
DIE = text("""
INSERT INTO dead_events
       (provider, project_id, reason, answer, mapping_version, event, received_at)
SELECT 'mixpanel', 'p', 'no', '', 1, '', :moment FROM generate_series(1, 1500)
""")
PARTITIONS = """
SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
 WHERE inhparent = 'events'::regclass ORDER BY 1
"""


def name_of(moment: datetime) -> str:
    """Return the partition of a month."""
    return f"events_{moment:%Y_%m}"


@pytest.fixture
def database_url(create_migrated: Callable[[], str]) -> str:
    """Return a database with partitions for all three months."""
    url = create_migrated()
    link = GuardedConnection(open_engine(url))
    for moment in (OLD, PART, NEW):  # so that a service that starts has none to add
        with link.connected(30) as connection:
            add_months(connection, moment.date())
    link.close()
    return url


@pytest.fixture
def service(database_url: str) -> Iterator[Service]:
    """Provide a service on it, of two workers."""
    with running_service({"DATABASE_URL": database_url, "WORKERS": "2"}) as service:
        yield service


@pytest.fixture
def database(database_url: str) -> Iterator[Connection]:
    """Provide a connection to it."""
    with closing(psycopg2.connect(database_url)) as connection:
        connection.autocommit = True
        yield connection


@pytest.fixture
def engine(database_url: str) -> Engine:
    """How a command connects to it."""
    return open_engine(database_url)


def retain(service: Service, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run `productgraph retention`."""
    return service.run("retention", "--keep", KEEP, *options)


def post_at(tenant: Tenant, *moments: datetime) -> None:
    """Send an event for each moment, with the moment as its id."""
    events = [
        tenant.make_event({"event_id": moment.isoformat(), "event.timestamp": moment.isoformat()})
        for moment in moments
    ]
    assert tenant.post_events(events) == accepted(len(events))


def read_places(tenant: Tenant) -> dict[str, str]:
    """Return the partition of each of a project's events."""
    with tenant.database.cursor() as cursor:
        cursor.execute(
            # On Citus, it is the name of a shard.
            r"SELECT event_id, regexp_replace(tableoid::regclass::text, '_\d{6,}$', '')"
            " FROM events WHERE project_id = %s",
            [tenant.project.id],
        )
        return dict(cursor.fetchall())


@pytest.mark.slow
def test_old_months_go_while_ingestion_loses_nothing(tenant: Tenant) -> None:
    """With ingestion running, old months go and nothing else: no request fails, no event is lost.

    Events are deduplicated as before, and those of a dropped month that come later are stored in
    the default partition, until the next time.
    """
    ancient, future = datetime(2001, 1, 1, tzinfo=UTC), datetime(2150, 1, 1, tzinfo=UTC)
    post_at(tenant, OLD, PART, NEW, ancient, future)
    loaded = create_project(tenant.service)
    with running_load(tenant.service, loaded, http_clients=6, grpc_clients=3) as load:
        wait_until(lambda: len(load.answers) > 20)
        done = retain(tenant.service, "--yes")
        answered = len(load.answers)
        wait_until(lambda: len(load.answers) > answered + 20)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"dropped the partition {name_of(OLD)}" in done.stdout
    assert "deleted 1 rows of events_default" in done.stdout
    assert load.statuses() <= STORED
    assert sorted(read_stored(tenant.service, loaded)) == sorted(load.stored())
    left = {PART: name_of(PART), NEW: name_of(NEW), future: "events_default"}
    assert read_places(tenant) == {moment.isoformat(): place for moment, place in left.items()}
    post_at(tenant, OLD, PART, NEW, future, OLD)
    left[OLD] = "events_default"
    assert read_places(tenant) == {moment.isoformat(): place for moment, place in left.items()}
    assert "deleted 1 rows of events_default" in retain(tenant.service, "--yes").stdout
    assert OLD.isoformat() not in read_places(tenant)


@pytest.mark.slow
def test_retention_without_yes_deletes_nothing(tenant: Tenant, engine: Engine) -> None:
    """Without --yes, what would go is shown, and stays."""
    post_at(tenant, OLD, PART, NEW, datetime(2001, 1, 1, tzinfo=UTC))
    before, partitions = read_places(tenant), query(engine, PARTITIONS)
    done = retain(tenant.service)
    assert without_time(retain(tenant.service, "--dry-run").stdout) == without_time(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"{name_of(OLD)}, of unknown rows and 0\.\d MB", done.stdout)
    assert "1 rows of events_default" in done.stdout
    assert name_of(PART) not in done.stdout
    assert (read_places(tenant), query(engine, PARTITIONS)) == (before, partitions)
    query_nothing(engine, f"ANALYZE {name_of(OLD)}")
    assert f"{name_of(OLD)}, of about 1 rows" in retain(tenant.service).stdout


def without_time(output: str) -> str:
    """Return what a command printed without the time that it names."""
    return re.sub(r"\S+ \d\d:\d\d UTC", "", output)


def query_nothing(engine: Engine, statement: str) -> None:
    """Run a statement."""
    with connected(engine) as connection:
        connection.execute(text(statement))


@pytest.mark.slow
def test_retention_gives_up_for_a_long_reader(tenant: Tenant, engine: Engine) -> None:
    """A long reader makes it give up, with ingestion running meanwhile; later it works."""
    partitions = query(engine, PARTITIONS)
    with (
        running_load(tenant.service, tenant.project, http_clients=4, grpc_clients=2) as load,
        connected(engine) as reader,
    ):
        reader.execute(text("SELECT count(*) FROM events"))
        done = retain(tenant.service, "--yes", "--tries", "3")
    assert (done.returncode, done.stdout) == (1, "")
    advice = r"productgraph: events_\d{4}_\d\d could not be locked in 3 tries, .+\n"
    assert re.fullmatch(advice, done.stderr)
    assert load.statuses() <= STORED
    assert load.longest() < LONGEST_SECONDS
    assert query(engine, PARTITIONS) == partitions
    assert retain(tenant.service, "--yes").returncode == 0
    assert (name_of(OLD),) not in query(engine, PARTITIONS)


def test_two_retention_runs_at_once_both_succeed(database_url: str, engine: Engine) -> None:
    """Two that run at the same moment both succeed."""
    run = partial(run_command, settings={"DATABASE_URL": database_url})
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(run, "retention", "--keep", KEEP, "--yes") for _ in range(2)]
        assert [(end.result().returncode, end.result().stderr) for end in ends] == [(0, "")] * 2
    assert (name_of(OLD),) not in query(engine, PARTITIONS)


def test_old_default_rows_go_in_small_transactions(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default partition loses its old rows a part at a time, each in a transaction."""
    monkeypatch.setattr("server.storage.retention._PAGES", 4)
    columns = "event_id, project_id, session_id, event_type, event_timestamp"
    rows = "i::text, 'p', 's', 'custom', '2001-01-01'::timestamptz + i * interval '1 day'"
    insert = f"INSERT INTO events ({columns}) SELECT {rows} FROM generate_series(1, 3000) i"
    query_nothing(engine, insert)
    cut, left = datetime(2005, 1, 1, tzinfo=UTC), 3000
    with connected(engine) as connection:
        for deleted in delete_expired_rows(connection, cut):
            left -= deleted
            assert deleted < 1000
            assert query(engine, "SELECT count(*) FROM events_default") == [(left,)]
    assert query(engine, "SELECT min(event_timestamp) FROM events") == [(cut,)]
    assert left == 3000 - (cut - datetime(2001, 1, 2, tzinfo=UTC)).days


def test_a_partition_goes_once_its_end_is_reached(engine: Engine) -> None:
    """A partition goes once its end is reached, whatever the time zone and whoever made it."""
    [(name,)] = query(engine, "SELECT current_database()")
    query_nothing(engine, f"ALTER DATABASE {name} SET timezone = 'Pacific/Kiritimati'")
    strange = "FROM (MINVALUE) TO ('1999-01-01 00:00+00')"
    query_nothing(engine, f'CREATE TABLE "Odd one" PARTITION OF events FOR VALUES {strange}')
    cut = datetime(1999, 1, 1, tzinfo=UTC)
    with connected(engine) as connection:
        assert list_expired_partitions(connection, cut - timedelta(microseconds=1)) == []
        [partition] = list_expired_partitions(connection, cut)
        connection.commit()
        drop_partition(connection, partition)
    assert ("Odd one",) not in query(engine, PARTITIONS)


def test_rejected_and_dead_events_expire_by_arrival(database_url: str, engine: Engine) -> None:
    """Rejected and dead events go by the time at which they came."""
    with connected(engine) as connection:
        for days in (29, 31):
            moment = NOW - timedelta(days=days)
            rows = [Rejection("p", moment, "http", str(days), 1, b"x")] * 1500
            insert_rejections(connection, rows)
            with connection.begin():
                connection.execute(DIE, {"moment": moment})
    arguments = ("retention", "--keep", KEEP)
    settings = {"DATABASE_URL": database_url}
    shown = run_command(*arguments, settings=settings).stdout
    assert "1500 rejected events\n  1500 dead events" in shown
    shown = run_command(*arguments, "--yes", settings=settings).stdout
    assert "deleted 1500 rejected events\ndeleted 1500 dead events" in shown
    for table in ("rejected_events", "dead_events"):
        found = query(engine, f"SELECT reason, count(*) FROM {table} GROUP BY 1")
        assert found == [("29" if table == "rejected_events" else "no", 1500)]


@pytest.mark.parametrize("keep", ["5m", "0d", "90", "-1d", "1.5d", "100000d"])
def test_retention_keeps_only_whole_days(keep: str) -> None:
    """Only whole days can be kept, so that no unit is mistaken for another."""
    done = run_command("retention", f"--keep={keep}", "--yes", settings={})
    assert done.returncode == 2
    assert "must be a number of days such as 90d" in done.stderr
