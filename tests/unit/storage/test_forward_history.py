"""Since when a provider is known to be enabled."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from server.storage.connection import Connection, Engine, connected
from server.storage.forward_history import note_providers, read_history


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    """Open a connection to a database without history."""
    with connected(engine) as connection:
        connection.execute(text("TRUNCATE forward_history"))
        connection.commit()
        yield connection


def read_since(connection: Connection) -> dict[str, datetime | None]:
    """Return since when each provider is enabled."""
    with connection.begin():
        return {known.provider: known.enabled_since for known in read_history(connection)}


def test_the_first_service_enables_at_once_and_for_good(connection: Connection) -> None:
    """On a new database a provider is enabled from now on, and later starts change nothing."""
    note_providers(connection, {"a"}, {"b"})
    since = read_since(connection)
    assert since["b"] is None
    assert since["a"] is not None
    assert since["a"] <= datetime.now(UTC) + timedelta(seconds=5)
    note_providers(connection, {"a"}, {"b"})
    assert read_since(connection) == since


def test_a_service_without_the_provider_ends_what_is_known(connection: Connection) -> None:
    """While services disagree nothing is known, nor for some time after, until one has gone."""
    note_providers(connection, {"a"}, set())
    note_providers(connection, set(), {"a"})
    assert read_since(connection) == {"a": None}
    before = datetime.now(UTC)
    note_providers(connection, {"a"}, set())
    since = read_since(connection)["a"]
    assert since is not None
    assert since > before + timedelta(seconds=60)
