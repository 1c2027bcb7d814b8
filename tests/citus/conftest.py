"""The fixtures of all tests, with databases on a cluster of Citus in place of plain ones."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.engine.url import URL as Url  # noqa: N811 - beside the name of a variable

from server.storage.connection import open_engine
from server.storage.distribution import distribute
from server.storage.migrate import migrate
from tests.citus.borrowing import URL
from tests.support import console
from tests.support.services import Service, running_service

# Of each table. Tests make many databases, and a shard costs as much as a table.
SHARDS = 4


class Cluster:
    """A coordinator and its workers, which all take the same account."""

    def __init__(self, url: str) -> None:
        self._coordinator = make_url(url).set(drivername="postgresql")
        nodes = self._query(
            self._coordinator, "SELECT nodename, nodeport, groupid FROM pg_dist_node"
        )
        self.workers = [self._name(host, port) for host, port, group in nodes if group]
        [self.place] = [(host, port) for host, port, group in nodes if not group]

    def _name(self, host: str, port: int) -> Url:
        return self._coordinator.set(host=host, port=port)

    def name_on_worker(self, url: str) -> str:
        """Return a worker's address of the database that the coordinator has at `url`."""
        return _render(self.workers[0].set(database=make_url(url).database))

    def create_database(self, name: str) -> str:
        """Make an empty database on every node; return the coordinator's address of it."""
        for node in (*self.workers, self._coordinator):
            self._query(node, f"CREATE DATABASE {name}")
            self._query(node.set(database=name), "CREATE EXTENSION citus")
        database = self._coordinator.set(database=name)
        self._query(database, "SELECT citus_set_coordinator_host(%s, %s)", *self.place)
        for worker in self.workers:
            self._query(database, "SELECT citus_add_node(%s, %s)", worker.host, worker.port)
        return _render(database)

    def drop_database(self, name: str) -> None:
        """Remove a database from every node."""
        for node in (self._coordinator, *self.workers):
            self._query(node, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _query(self, node: Url, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with closing(psycopg2.connect(_render(node))) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []


def _render(address: Url) -> str:
    return address.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """Return the cluster of TEST_CITUS_URL."""
    return Cluster(os.environ[URL])


@pytest.fixture(scope="session")
def names() -> list[str]:
    """Return the names of the databases that the tests have made."""
    return []


@pytest.fixture(scope="session")
def create_database(cluster: Cluster, names: list[str]) -> Callable[[], str]:
    """Make empty databases on every node."""

    def create() -> str:
        names.append(f"test_{uuid.uuid4().hex}")
        return cluster.create_database(names[-1])

    return create


@pytest.fixture(scope="module", autouse=True)
def _dropped_databases(
    shared_url: str,  # noqa: ARG001 - that is made before, and stays
    cluster: Cluster,
    names: list[str],
) -> Iterator[None]:
    """Remove the databases of each module at its end: each of them keeps connections open."""
    kept = len(names)
    yield
    for name in names[kept:]:
        cluster.drop_database(name)
    del names[kept:]


@pytest.fixture(scope="session")
def create_migrated(create_database: Callable[[], str]) -> Callable[[], str]:
    """Make databases with the tables of this version, distributed."""

    def create() -> str:
        url = create_database()
        engine = open_engine(url)
        migrate(engine)
        list(distribute(engine, SHARDS))
        return url

    return create


@pytest.fixture(scope="session")
def shared_url(cluster: Cluster, create_migrated: Callable[[], str]) -> Iterator[str]:
    """Return the database of the service that all tests here share."""
    url = create_migrated()
    yield url
    cluster.drop_database(make_url(url).database or "")


@pytest.fixture(scope="session")
def service(shared_url: str) -> Iterator[Service]:
    """Provide a running service that all tests here share."""
    with running_service({"DATABASE_URL": shared_url, **console.SETTINGS}) as running:
        yield running
