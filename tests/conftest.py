"""What most tests share: one PostgreSQL, one running service, a project for each test."""

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy.engine import make_url

from server.storage.connection import Engine, open_engine
from server.storage.embedded import EmbeddedPostgres
from server.storage.migrate import migrate
from tests.support import console
from tests.support.clients import Tenant, open_tenant
from tests.support.projects import Project, create_project
from tests.support.services import Service, running_service

# A busy machine must not fail a test: hypothesis does not time what it runs.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# A shell ignores Ctrl-C for what it runs in the background, and programs of tests would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What the processes of one run share: a directory that other accounts may enter.
_SHARED = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the shared directory, or take over the one of the process that made it."""
    given = getattr(config, "workerinput", {}).get("shared")
    config.stash[_SHARED] = given or tempfile.mkdtemp()
    Path(config.stash[_SHARED]).chmod(0o711)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker of pytest-xdist the shared directory."""
    node.workerinput["shared"] = node.config.stash[_SHARED]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the shared directory, if this process made it."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.stash[_SHARED], ignore_errors=True)


@pytest.fixture(scope="session")
def open_directory() -> Iterator[Path]:
    """Provide a directory that the account of an embedded PostgreSQL may enter."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


@pytest.fixture(scope="session")
def postgres_url(pytestconfig: pytest.Config) -> Iterator[str]:
    """Provide a PostgreSQL for all tests of a run: TEST_DATABASE_URL, or an embedded one."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
    else:
        directory = Path(pytestconfig.stash[_SHARED], "data")
        with EmbeddedPostgres(directory, create=True) as embedded:
            yield embedded.url


@pytest.fixture(scope="session")
def create_database(postgres_url: str) -> Iterator[Callable[..., str]]:
    """Make empty databases, in the form libpq takes."""
    server = make_url(postgres_url).set(drivername="postgresql")
    names: list[str] = []

    def create(options: str = "") -> str:
        names.append(f"test_{uuid.uuid4().hex}")
        statement = f"CREATE DATABASE {names[-1]} {options}"
        _execute(server.render_as_string(hide_password=False), statement)
        return server.set(database=names[-1]).render_as_string(hide_password=False)

    yield create
    if "TEST_DATABASE_URL" not in os.environ:
        return  # they go with their server; dropping each would take seconds
    for name in names:
        _execute(server.render_as_string(hide_password=False), f"DROP DATABASE {name} WITH (FORCE)")


def _execute(url: str, statement: str) -> None:
    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        connection.cursor().execute(statement)


@pytest.fixture(scope="session")
def create_migrated(create_database: Callable[..., str]) -> Callable[[], str]:
    """Make databases with the tables of this version, as copies of one."""
    original = create_database()
    engine = open_engine(original)
    migrate(engine)
    engine.dispose()
    return partial(create_database, f"TEMPLATE {make_url(original).database}")


@pytest.fixture(scope="module")
def url(create_migrated: Callable[[], str]) -> str:
    """Return a database of the module's own, in the form libpq takes."""
    return create_migrated()


@pytest.fixture(scope="module")
def engine(url: str) -> Engine:
    """How the service connects to it."""
    return open_engine(url)


@pytest.fixture(scope="session")
def service(create_migrated: Callable[[], str]) -> Iterator[Service]:
    """Provide a running service that all tests share."""
    with running_service({"DATABASE_URL": create_migrated(), **console.SETTINGS}) as running:
        yield running


@pytest.fixture
def project(service: Service) -> Project:
    """Return a fresh project of the shared service, with a key."""
    return create_project(service)


@pytest.fixture
def database(service: Service) -> Iterator["psycopg2.extensions.connection"]:
    """Provide a connection to the shared service's database."""
    with closing(psycopg2.connect(service.database_url)) as connection:
        connection.autocommit = True
        yield connection


@pytest.fixture
def tenant(service: Service) -> Iterator[Tenant]:
    """Provide a project of the test's own that sends events to the service."""
    with open_tenant(service) as tenant:
        yield tenant
