"""On several nodes, one that is away is missed only by the projects whose events it has.

A plain PostgreSQL stands in for a coordinator: it has as much of Citus's catalogue as is read, and
a trigger that does for the events of a node that is away what Citus does.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from typing import Any

import psycopg2
import pytest

from server.errors import Unavailable
from server.ingest.group_commit import Writer
from server.storage.connection import Engine, GuardedConnection, open_engine
from server.storage.errors import NodeFailed
from server.storage.events import EventStore
from server.storage.outages import OutageLog
from tests.support.events import ENCODER
from tests.support.services import wait_until
from tests.unit.ingest.test_group_commit import Table, is_open, make_writer, running, submit

# Projects whose names begin with 'far' are on the second node, all others on the first one.
CATALOGUE = """
SET allow_system_table_mods = on;
CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass);
CREATE TABLE pg_catalog.pg_dist_node
    (groupid int, nodename text, nodeport int, isactive boolean, noderole text);
CREATE TABLE pg_catalog.pg_dist_placement (shardid bigint, groupid int);
INSERT INTO pg_dist_partition VALUES ('events');
INSERT INTO pg_dist_node VALUES
    (1, 'first', 5432, true, 'primary'), (2, 'second', 5432, true, 'primary');
INSERT INTO pg_dist_placement VALUES (10, 1), (20, 2);
CREATE FUNCTION pg_catalog.get_shard_id_for_distribution_column(regclass, text) RETURNS bigint
    LANGUAGE sql AS $$ SELECT CASE WHEN $2 ^@ 'far' THEN 20 ELSE 10 END $$;
CREATE FUNCTION pg_catalog.citus_check_connection_to_node(text, int) RETURNS boolean
    LANGUAGE sql AS $$ SELECT $1 = 'first' OR NOT EXISTS (SELECT FROM public.silence) $$;
"""
TRIGGER = """
CREATE TABLE loss (way text);
CREATE TABLE silence (way text);
CREATE SEQUENCE tries;
CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM loss) THEN
        PERFORM nextval('tries');
    END IF;
    WHILE EXISTS (SELECT FROM loss WHERE way = 'frozen') LOOP
        PERFORM pg_sleep(0.02);
    END LOOP;
    IF EXISTS (SELECT FROM loss WHERE way = 'disk') THEN
        RAISE EXCEPTION 'could not write a block' USING ERRCODE = '58030';
    END IF;
    IF EXISTS (SELECT FROM loss) THEN
        RAISE EXCEPTION 'connection to the remote node failed' USING ERRCODE = '08006';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER lose BEFORE INSERT ON events FOR EACH ROW
    WHEN (NEW.project_id ^@ 'far') EXECUTE FUNCTION lose();
CREATE SEQUENCE held_tries;
CREATE FUNCTION count_try() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('held_tries');
    RETURN NEW;
END $$;
CREATE TRIGGER count_try BEFORE INSERT ON events FOR EACH ROW
    WHEN (NEW.project_id = 'a near one') EXECUTE FUNCTION count_try();
"""


class Cluster(Table):
    """The stand-in, whose second node can be lost."""

    @contextmanager
    def losing(self, way: str, *, silently: bool = True) -> Iterator[None]:
        """Let the second node be killed or frozen meanwhile; it answers unless `silently`."""
        self.run("INSERT INTO loss VALUES (%s)", way)
        if silently:
            self.run("INSERT INTO silence VALUES (%s)", way)
        try:
            yield
        finally:
            self.run("DELETE FROM loss")
            self.run("DELETE FROM silence")

    def run(self, statement: str, *parameters: Any) -> None:
        """Commit a statement."""
        with self._holder, self._holder.cursor() as cursor:
            cursor.execute(statement, parameters)

    def count_tries(self, sequence: str = "tries") -> int:
        """Return how often an event of the lost node was tried, or one that may be held."""
        [[count]] = self.query(f"SELECT last_value FROM {sequence}")
        return int(count)


def open_cluster(url: str, statements: str) -> Cluster:
    """Return a database after some statements."""
    with closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(statements)
    return Cluster(url)


@pytest.fixture(scope="module")
def cluster(url: str) -> Iterator[Cluster]:
    """Provide the stand-in."""
    with closing(open_cluster(url, TRIGGER + CATALOGUE)) as cluster:
        yield cluster


@pytest.fixture
def writer(
    engine: Engine,
    cluster: Cluster,  # noqa: ARG001 - which has been made before the writer asks
) -> Iterator[Writer]:
    """Provide a running writer that knows its nodes, all of which are there."""
    with running(make_writer(engine)) as writer:
        submit(writer, "near", "warm").result(60)
        yield writer


def submit_together(writer: Writer, table: Table, *events: tuple[str, str]) -> "list[Future[None]]":
    """Hand in events, of a project each, that share a group."""
    with table.locked():
        first = submit(writer, "near", "lead")
        table.wait_for_writer()
        stored = [submit(writer, project, event) for project, event in events]
    first.result(60)
    return stored


def is_refused(stored: "Future[None]") -> bool:
    """Return whether a request was answered 503."""
    return isinstance(stored.exception(60), Unavailable)


def is_taken(writer: Writer, project: str, event: str) -> bool:
    """Return whether an event is stored."""
    return submit(writer, project, event).exception(60) is None


def test_a_dead_node_refuses_its_own_projects_only(writer: Writer, cluster: Cluster) -> None:
    """Of a group, those whose node is dead are refused, at once from then on, until it is back."""
    with cluster.losing("killed"):
        near, far = submit_together(writer, cluster, ("near", "a"), ("far", "b"))
        near.result(60)
        assert is_refused(far)
        tries = cluster.count_tries()
        for number in range(30):
            assert is_refused(submit(writer, "far", f"refused {number}"))
            submit(writer, "near", f"taken {number}").result(60)
        assert cluster.count_tries() == tries
    wait_until(lambda: is_taken(writer, "far", "b"))
    assert {"a", *(f"taken {number}" for number in range(30))} <= cluster.find_events("near")
    assert cluster.find_events("far") == {"b"}


def test_the_log_says_which_node_is_away(
    writer: Writer, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has one line when a node is lost and one when it is back, and tells of no outage."""
    caplog.set_level(logging.INFO, "productgraph")
    with cluster.losing("killed"):
        for event in "abc":
            assert is_refused(submit(writer, "far log", event))
    wait_until(lambda: is_taken(writer, "far log", "d"))
    wait_until(lambda: "is back" in caplog.text)
    lines = [(record.message, vars(record).get("node")) for record in caplog.records]
    assert lines == [
        ("a node of the database is away", "second:5432"),
        ("a node of the database is back", "second:5432"),
    ]


def test_a_frozen_node_stops_others_for_moments_only(writer: Writer, cluster: Cluster) -> None:
    """A commit that waits for a frozen node is broken off, long before its deadline."""
    with cluster.losing("frozen"):
        frozen = submit(writer, "far frozen", "a", seconds=40.0)
        behind = [submit(writer, "near frozen", str(number), seconds=40.0) for number in range(5)]
        for future in behind:
            future.result(60)
        assert is_refused(frozen)
        tries = cluster.count_tries()
        assert is_refused(submit(writer, "far frozen", "b"))
        assert is_taken(writer, "near frozen", "last")
        assert cluster.count_tries() == tries
    wait_until(lambda: is_taken(writer, "far frozen", "c"))
    assert len(cluster.find_events("near frozen")) == 6
    assert "c" in cluster.find_events("far frozen")


def test_rows_that_a_frozen_node_holds_delay_nobody(writer: Writer, cluster: Cluster) -> None:
    """What shared the commit that hangs is refused while it does, with few tries at it."""
    with cluster.losing("frozen"):
        events = [("a near one", str(number)) for number in range(20)]
        held = submit_together(writer, cluster, *events, ("far held", "b"))
        assert all(map(is_refused, held))
        tries = cluster.count_tries("held_tries")
        for _ in range(3):
            again = [submit(writer, *event) for event in events]
            assert is_taken(writer, "near held", "new")
            assert all(map(is_refused, again))
        assert cluster.count_tries("held_tries") - tries < len(events)
    wait_until(lambda: is_taken(writer, "a near one", "0"))
    for event in events:
        submit(writer, *event).result(60)
    assert len(cluster.find_events("a near one")) == 20


def test_an_error_of_the_own_disk_is_an_outage(
    writer: Writer, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """What the server says of its own disk is no failure of another node."""
    with cluster.losing("disk", silently=False):
        error = submit(writer, "far disk", "a").exception(60)
        assert isinstance(error, Unavailable)
        assert not isinstance(error, NodeFailed)
    wait_until(lambda: is_open(writer, "far disk"))
    assert "a node of the database is away" not in caplog.text


def test_a_node_that_answers_but_stores_nothing_is_tried_seldom(
    writer: Writer, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that fails what it is given, but answers, is tried again after a pause."""
    with cluster.losing("killed", silently=False):
        assert is_refused(submit(writer, "far failing", "a"))
        tries = cluster.count_tries()
        for number in range(30):
            assert is_refused(submit(writer, "far failing", str(number)))
            assert is_taken(writer, "near failing", str(number))
        assert cluster.count_tries() - tries < 30
        wait_until(
            lambda: is_refused(submit(writer, "far failing", "b")) and cluster.count_tries() > tries
        )
    wait_until(lambda: is_taken(writer, "far failing", "c"))
    assert caplog.text.count("a node of the database is away") == 1


def test_a_node_whose_place_another_takes_is_forgotten(
    writer: Writer, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as the catalogue names a standby instead of a node, nobody waits for that node."""
    caplog.set_level(logging.INFO, "productgraph")
    with cluster.losing("killed"):
        assert is_refused(submit(writer, "far moved", "a"))
        cluster.run("UPDATE pg_dist_node SET nodename = 'first' WHERE groupid = 2")
        wait_until(lambda: "no longer belongs to the database" in caplog.text)
    cluster.run("UPDATE pg_dist_node SET nodename = 'second' WHERE groupid = 2")
    wait_until(lambda: is_taken(writer, "far moved", "b"))


def test_a_lost_connection_elsewhere_fails_only_its_request(
    create_migrated: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever loses a connection of its own in the database, without Citus, fails for itself."""
    url = create_migrated()
    outages = GuardedConnection(open_engine(url), outages=OutageLog())
    with (
        closing(open_cluster(url, TRIGGER)) as table,
        running(Writer(outages, EventStore(ENCODER.columns), max_waiting_bytes=1 << 20)) as writer,
    ):
        with table.losing("killed"):
            near, far = submit_together(writer, table, ("near", "a"), ("far", "b"))
            near.result(60)
            assert is_refused(far)
        submit(writer, "far", "b").result(60)
    assert "the database is unavailable" not in caplog.text
