"""The service as a role that reads and writes rows, and can change no table."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg2
import pytest
from sqlalchemy.engine import make_url

from server.cli.psql import _find_psql
from server.config import read_settings
from tests.support.clients import Tenant, accepted, open_tenant
from tests.support.events import to_message
from tests.support.services import ROOT, run_command, running_service, wait_until

OWNER, ROLE = "productgraph_owner", "productgraph_service"
ROWS = {"SELECT", "INSERT", "UPDATE", "DELETE"}


@dataclass(frozen=True)
class Roles:
    """A database as three accounts see it."""

    admin: str
    owner: str
    service: str

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as the superuser."""
        with closing(psycopg2.connect(self.admin)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []


def run_roles(url: str, owner: str = OWNER) -> None:
    """Run scripts/deploy/roles.sql as it says of itself."""
    variables = {"owner": owner, "role": ROLE, "password": "a ' password"}
    options = [word for name, text in variables.items() for word in ("-v", f"{name}={text}")]
    psql = _find_psql(read_settings({}))
    script = str(ROOT / "scripts/deploy/roles.sql")
    done = subprocess.run(
        [psql, "-X", "-q", *options, "-f", script, url], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def roles(create_database: Callable[[], str]) -> Iterator[Roles]:
    """Make a database with an owner, and the role of the service; the tables are made last."""
    admin = make_url(create_database())
    assert admin.database
    urls = {
        name: admin.set(username=name).render_as_string(hide_password=False)
        for name in (OWNER, ROLE)
    }
    roles = Roles(admin.render_as_string(hide_password=False), urls[OWNER], urls[ROLE])
    if not roles.query(f"SELECT 1 FROM pg_roles WHERE rolname = '{OWNER}'"):
        roles.query(f"CREATE ROLE {OWNER} LOGIN")
    roles.query(f"ALTER DATABASE {admin.database} OWNER TO {OWNER}")
    run_roles(roles.admin)
    assert run_command("migrate", settings={"DATABASE_URL": roles.owner}).returncode == 0
    run_roles(roles.admin)
    yield roles
    roles.query(f"REASSIGN OWNED BY {OWNER} TO CURRENT_USER; DROP OWNED BY {ROLE}, {OWNER}")


def find_missing_months(roles: Roles) -> list[str]:
    """Return the partitions that there should be and are not."""
    found = {name for (name,) in roles.query("SELECT relname FROM pg_class WHERE relispartition")}
    return [name for name in (f"events_{datetime.now(UTC):%Y_%m}",) if name not in found]


def test_the_service_runs_with_rights_on_rows_alone(roles: Roles) -> None:
    """New, repeated and rejected events over both protocols, keys and queries need no more."""
    granted = roles.query(
        "SELECT table_name, array_agg(privilege_type::text)"
        f" FROM information_schema.role_table_grants WHERE grantee = '{ROLE}' GROUP BY 1"
    )
    assert {name for name, _ in granted} >= {"events", "api_keys", "outbox_payloads", "dead_events"}
    assert all(set(rights) == ROWS for _, rights in granted)
    [[owned]] = roles.query(f"SELECT count(*) FROM pg_class WHERE relowner = '{ROLE}'::regrole")
    assert owned == 0
    settings = {
        "DATABASE_URL": roles.service,
        "ANALYTICS_ENABLED": "true",
        "AMPLITUDE_ENABLED": "true",
        "AMPLITUDE_API_KEY": "nobody",
        "AMPLITUDE_ENDPOINT": "http://127.0.0.1:9/batch",
    }
    with running_service(settings) as service, open_tenant(service) as tenant:
        send_everything(tenant)
        assert service.run("keys", "create", "--project", "p").returncode == 0
        assert service.run("events", "tail").stdout.count("evt_") == 4
        assert service.run("rejected", "list").stdout.count("wrong") == 1
        assert service.run("forward", "purge", "--provider", "amplitude", "--yes").returncode == 0
        messages = {line["message"] for line in service.read_log() if line["level"] == "ERROR"}
        assert messages == set()


def send_everything(tenant: Tenant) -> None:
    """Send events that are new, repeated and wrong, over both protocols."""
    events = [tenant.make_event({"event_id": f"evt_{n}"}) for n in range(3)]
    for _ in range(2):
        assert tenant.post_events(events) == accepted(3)
    assert tenant.ingest([to_message(tenant.make_event({"event_id": "evt_9"}))]) == accepted(1)
    assert tenant.post_events([{**events[0], "event.type": "wrong"}])["rejected"] == 1
    wait_until(lambda: "wrong" in tenant.service.run("rejected", "list").stdout)


@pytest.mark.slow
def test_migrate_makes_partitions_that_the_service_may_not(roles: Roles) -> None:
    """Without the right to make partitions, the service tells that one is missing, until it is."""
    assert find_missing_months(roles) == []
    month = f"events_{datetime.now(UTC):%Y_%m}"
    roles.query(f"DROP TABLE {month}")
    with running_service({"DATABASE_URL": roles.service}) as service:
        wait_until(lambda: "partitions are missing" in service.log.read_text())
        [line] = [
            each for each in service.read_log() if "partitions are missing" in each["message"]
        ]
        assert line["partitions"] == [month]
        assert find_missing_months(roles) == [month]
        assert run_command("migrate", settings={"DATABASE_URL": roles.owner}).returncode == 0
        assert find_missing_months(roles) == []
        with open_tenant(service) as tenant:
            now = datetime.now(UTC).isoformat()
            tenant.post_events([tenant.make_event({"event.timestamp": now})])
            assert service.run("events", "show", "evt_1").stdout.count(f"in {month}") == 1


@pytest.mark.parametrize(
    ("statement", "lacking"),
    [
        (f"REVOKE INSERT ON events FROM {ROLE}", "INSERT on events"),
        (f"REVOKE ALL ON api_keys FROM {ROLE}", "DELETE, INSERT, SELECT, UPDATE on api_keys"),
        (
            f"REVOKE USAGE ON SEQUENCE outbox_payloads_id_seq FROM {ROLE}",
            "USAGE on outbox_payloads",
        ),
        (
            "DO $$ BEGIN EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC, "
            f"{ROLE}', current_database()); END $$",
            "TEMPORARY on the database",
        ),
        (f"REVOKE SELECT ON events_default FROM {ROLE}", "SELECT on events_default"),
    ],
)
def test_the_start_names_the_right_that_is_missing(
    roles: Roles, statement: str, lacking: str
) -> None:
    """A service that lacks a right ends its start with one line that says which."""
    roles.query(statement)
    quiet = {"DATABASE_URL": roles.service, "PORT": "0", "GRPC_PORT": "0"}
    done = run_command("serve", settings=quiet)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "lacks" in line]
    assert re.search(f"the account {ROLE} lacks {lacking}.*: run scripts/deploy/roles.sql", line)
    assert run_command("doctor", settings={"DATABASE_URL": roles.service}).returncode == 1
