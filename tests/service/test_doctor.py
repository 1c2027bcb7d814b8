"""`productgraph doctor` finds what is left to do for production, and tells how."""

import json
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from typing import Any
from urllib.request import urlopen

import psycopg2
import pytest
from sqlalchemy.engine import make_url

from server.storage.connection import connected, open_engine
from server.storage.partitions import add_months
from tests.support.services import run_command, running_service


@pytest.fixture
def url(create_migrated: Callable[[], str]) -> str:
    """Make a database whose partitions are made, owned by an account without other rights."""
    url = create_migrated()
    account = "doctor"
    with connected(open_engine(url)) as tables:
        add_months(tables, datetime.now(UTC).date())
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [account])
        if not cursor.fetchone():
            cursor.execute(f"CREATE ROLE {account} LOGIN")
        cursor.execute(
            "SELECT format('ALTER TABLE %s OWNER TO " + account + "', oid::regclass) FROM pg_class"
            " WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace"
        )
        for (statement,) in cursor.fetchall():
            cursor.execute(statement)
        cursor.execute(f"GRANT CREATE, USAGE ON SCHEMA public TO {account}")
        connection.commit()
    return make_url(url).set(username=account).render_as_string(hide_password=False)


def execute(url: str, statement: str) -> None:
    """Run a statement and commit it."""
    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        connection.cursor().execute(statement)


def look(settings: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return what the command finds, by name."""
    done = run_command("doctor", "--json", settings=settings)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    is_healthy = all(finding["is_done"] for finding in found)
    assert done.returncode == (0 if is_healthy else 1), done.stderr
    assert found, done.stderr
    return {finding["name"]: finding for finding in found}


def find_left(settings: dict[str, str]) -> set[str]:
    """Return the names of what is left to do."""
    return {name for name, finding in look(settings).items() if not finding["is_done"]}


def test_a_service_that_is_ready_for_production_is_healthy(url: str) -> None:
    """With everything done nothing is left; until somebody reads the metrics, that is."""
    settings = {"DATABASE_URL": url}
    with running_service(settings) as service:
        assert service.run("keys", "create", "--project", "p").returncode == 0
        asked = settings | {"METRICS_PORT": service.metrics_url.split(":")[2].split("/")[0]}
        assert find_left(asked) == {"alerts"}
        for _ in range(2):
            urlopen(service.metrics_url).read()
        assert find_left(asked) == set()
        printed = run_command("doctor", settings=asked).stdout.splitlines()
        assert all(line.startswith("ok    ") for line in printed)


@pytest.mark.parametrize(
    ("name", "statement", "word"),
    [
        ("API keys", "DELETE FROM api_keys", "keys create"),
        (
            "API keys",
            "INSERT INTO api_keys (project_id, name, digest, created_at)"
            " VALUES ('p', 'old', 'x', now() - interval '8 days')",
            "never used",
        ),
        ("indexes", "DROP INDEX events_received_at", "run migrate"),
        ("partitions", "DROP TABLE events_{month}", "events_{month}"),
        (
            "retention",
            "CREATE TABLE events_2020_01 PARTITION OF events"
            " FOR VALUES FROM ('2020-01-01Z') TO ('2020-02-01Z')",
            "retention daily",
        ),
        ("durability", "ALTER ROLE doctor SET synchronous_commit = off", "synchronous_commit = on"),
    ],
)
def test_each_lack_is_found_with_its_remedy(
    url: str, create_database: Callable[[], str], name: str, statement: str, word: str
) -> None:
    """Each thing that is not as it should be is named, with what to do about it."""
    owner = make_url(create_database()).set(database=make_url(url).database)
    admin = owner.render_as_string(hide_password=False)
    execute(admin, "INSERT INTO api_keys (project_id, name, digest) VALUES ('p', 'new', 'y')")
    settings = {"DATABASE_URL": url}
    assert name not in find_left(settings)
    month = f"{datetime.now(UTC):%Y_%m}"
    execute(admin, statement.format(month=month))
    try:
        finding = look(settings)[name]
        assert not finding["is_done"]
        assert word.format(month=month) in finding["text"]
    finally:
        execute(admin, "ALTER ROLE doctor RESET ALL")


def test_a_superuser_and_the_embedded_database_are_found(
    create_migrated: Callable[[], str],
) -> None:
    """An account with too many rights is found, and an open gRPC port without TLS."""
    left = find_left({"DATABASE_URL": create_migrated(), "HOST": "0.0.0.0"})
    assert {"rights", "TLS of the gRPC port", "partitions", "API keys", "alerts"} <= left
