"""A person's events are deleted from every place where they are kept, and nobody else's are."""

import json
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from server import failpoints
from server.events.persons import Person
from server.privacy.deletion import Deletion
from server.privacy.digests import Digests
from server.storage.accounts import find_account
from server.storage.connection import connected, open_engine
from server.storage.places import find_programs
from tests.support.clients import Tenant, open_tenant
from tests.support.events import make_message
from tests.support.forwarding import END_LEASES, SECRET, Bench, enable_providers
from tests.support.persons import PersonDatabase
from tests.support.provider_servers import AmplitudeServer, MixpanelServer
from tests.support.services import (
    clean_environment,
    run_command,
    running_service,
    wait_until,
)

KEY = "0123456789abcdef0123456789abcdef"
USER = "žofie o'neill\"x <z@example.org>"
LATER = """
UPDATE person_deletions SET deleted_at = now() - interval '1 hour'
 WHERE project_id = %s RETURNING id
"""
PAYLOADS = """
SELECT p.id, encode(events, 'hex'), p.event_count, provider, positions, d.event_count, lease
  FROM outbox_payloads p JOIN outbox_deliveries d ON d.payload_id = p.id ORDER BY d.id
"""
PLACES = ("events", "outbox", "dead", "rejected", "answers")


@pytest.fixture
def database(create_migrated: Callable[[], str]) -> PersonDatabase:
    """Return a database of the test's own."""
    return PersonDatabase(create_migrated())


@pytest.fixture
def project() -> str:
    """Return the name of a project."""
    return f"p_{uuid.uuid4().hex[:8]}"


def run(
    database: PersonDatabase, *arguments: str, more: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `productgraph person` with a secret."""
    settings = {"DATABASE_URL": database.url, "PRIVACY_SECRET": KEY} | dict(more or {})
    return run_command("person", *arguments, settings=settings)


def delete(database: PersonDatabase, project: str, *options: str) -> dict[str, Any]:
    """Delete a person, and return the receipt."""
    done = run(database, "delete", "--project", project, "--yes", "--no-wait", *options)
    assert done.returncode == 0, done.stderr
    receipt: dict[str, Any] = json.loads(done.stdout)
    return receipt


def dump(database: PersonDatabase, directory: Path) -> str:
    """Return what pg_dump writes of the whole database."""
    pg_dump = find_programs(find_account(directory)) / "pg_dump"
    done = subprocess.run([pg_dump, database.url], capture_output=True, text=True, check=True)
    return done.stdout


def find_traces(dumped: str, user: str) -> Counter[str]:
    """Count the lines of a dump that name a user, as text or as bytes in hex, by tables."""
    traces: Counter[str] = Counter()
    table = ""
    texts = [user, json.dumps(user)[1:-1], json.dumps(user, ensure_ascii=False)[1:-1]]
    wanted = [form for text in texts for form in (text, text.encode().hex())]
    wanted += [form.replace("\\", "\\\\") for form in wanted]  # as COPY has it
    for line in dumped.splitlines():
        if line.startswith("COPY "):
            table = line.split()[1].removeprefix("public.")
        traces[table] += any(form in line for form in wanted)
    return +traces


def scatter_all(database: PersonDatabase, project: str) -> None:
    """Put a person and neighbours everywhere; a provider has named the person to a neighbour."""
    database.scatter(project, "own", USER)
    database.scatter(project, "other", f"not {USER[1:]}")
    database.scatter(f"{project}_2", "elsewhere", "somebody")
    database.store(
        [make_message(project, f"mixed-{n}", user_id=(USER, "n1", "n2")[n % 3]) for n in range(9)]
    )
    answer = json.dumps({"throttled_users": {USER: 1}})
    database.bury(make_message(project, "named", user_id="n1"), answer, "mixpanel")
    database.query(
        "INSERT INTO forward_lanes (provider, last_error) VALUES ('amplitude', %s)",
        f'429 {{"exceeded":"{USER}"}}',
    )


def read_others(database: PersonDatabase) -> list[Any]:
    """Return all that is kept of others, but for answers."""
    tables = {
        "events": "project_id || event_id",
        "dead_events": "id || encode(event, 'hex')",
        "rejected_events": "id || encode(event, 'hex')",
    }
    return [
        database.query(f"SELECT {columns} FROM {table} ORDER BY 1")
        for table, columns in tables.items()
    ]


def test_nothing_of_a_deleted_person_is_in_a_dump(
    database: PersonDatabase, project: str, open_directory: Path
) -> None:
    """A dump names the person in every table before the deletion, and in none behind it."""
    scatter_all(database, project)
    assert set(find_traces(dump(database, open_directory), USER)) == {
        *("events_default", "outbox_payloads", "dead_events", "rejected_events", "forward_lanes")
    }
    receipt = delete(database, project, "--user", USER)
    assert receipt["deleted"] == dict(zip(PLACES, (4, 4, 1, 2, 2), strict=True))
    assert find_traces(dump(database, open_directory), USER) == Counter()
    [(answer,)] = database.query("SELECT answer FROM dead_events WHERE provider = 'mixpanel'")
    assert answer == '{"throttled_users": {"…": 1}}'


def test_a_dry_run_counts_and_deletes_nothing(database: PersonDatabase, project: str) -> None:
    """Without --yes the places are counted, and everything stays."""
    scatter_all(database, project)
    before = read_others(database)
    done = run(database, "delete", "--project", project, "--user", USER)
    assert done.stdout == (
        "4 in events, 4 in the outbox, 1 among dead events, 2 among rejected events;"
        " --yes deletes them\n"
    )
    assert read_others(database) == before
    assert database.query("SELECT count(*) FROM person_deletions") == [(0,)]


def test_a_deletion_needs_its_secret(database: PersonDatabase, project: str) -> None:
    """Without PRIVACY_SECRET nothing is deleted, and the command says what is missing."""
    scatter_all(database, project)
    options = ("--project", project, "--user", USER, "--yes")
    done = run(database, "delete", *options, more={"PRIVACY_SECRET": ""})
    assert (done.returncode, done.stdout) == (1, "")
    assert "PRIVACY_SECRET must be set" in done.stderr
    assert database.query("SELECT count(*) FROM events WHERE user_id = %s", USER) == [(4,)]


def test_a_deletion_goes_through_everything_twice(database: PersonDatabase, project: str) -> None:
    """What comes while it waits is deleted the second time, and the receipt counts it apart."""
    scatter_all(database, project)
    first = delete(database, project, "--user", USER)
    assert first["finished_at"] is None
    assert first["again_at"] > first["deleted_at"]
    database.scatter(project, "late", USER)
    unchanged = delete(database, project, "--user", USER)
    assert unchanged == first  # too early
    database.query(LATER, project)
    second = delete(database, project, "--user", USER)
    assert second["receipt"] == first["receipt"]
    assert second["deleted"] == first["deleted"]
    assert second["deleted_again"] == dict(zip(PLACES, (1, 1, 1, 2, 0), strict=True))
    assert second["finished_at"] is not None
    digests = [digest.hex() for digest in Digests(KEY).of_person(Person(project, USER))]
    assert second["digests"] == digests
    assert delete(database, project, "--user", USER)["receipt"] != first["receipt"]


@pytest.mark.slow
def test_a_killed_deletion_is_completed_by_another_run(
    database: PersonDatabase, project: str, tmp_path: Path
) -> None:
    """Killed after any of its steps, it is completed by the next runs, with one right receipt."""
    scatter_all(database, project)
    options = ("--project", project, "--user", USER, "--yes", "--no-wait")
    command = [sys.executable, "-m", "server", "person", "delete", *options]
    armed = {"PRODUCTGRAPH_FAILPOINTS": str(tmp_path)}
    environment = clean_environment({"DATABASE_URL": database.url, "PRIVACY_SECRET": KEY} | armed)
    deaths = 0
    while True:
        (tmp_path / failpoints.AFTER_DELETION).touch()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        deaths += 1
    assert deaths >= 5
    receipt = json.loads(done.stdout)
    assert receipt["deleted"] == dict(zip(PLACES, (4, 4, 1, 2, 2), strict=True))
    done = run(database, "export", "--project", project, "--user", USER)
    assert done.stdout == ""
    assert database.query("SELECT count(*) FROM person_deletions") == [(1,)]


def test_neighbours_are_untouched_by_a_deletion(database: PersonDatabase, project: str) -> None:
    """Events of others stay as they are in every place, byte by byte."""
    database.scatter(project, "other", f"not {USER[1:]}")
    database.scatter(f"{project}_2", "elsewhere", USER)
    others = read_others(database)
    payloads = database.query(PAYLOADS)
    database.scatter(project, "own", USER)
    delete(database, project, "--user", USER)
    assert read_others(database) == others
    assert database.query(PAYLOADS) == payloads


def test_whom_a_restore_brings_back_is_deleted_again(
    database: PersonDatabase, project: str, tmp_path: Path
) -> None:
    """By the receipts alone, persons are found who are back, in whatever place, and deleted."""
    for user in (USER, "gone"):
        database.scatter(project, user[:3], user)
    file = tmp_path / "receipts.jsonl"
    options = ("--user", USER, "--anonymous-id", "a1")
    receipts = []
    for more in (options, ("--user", "gone")):
        delete(database, project, *more)
        database.query(LATER, project)
        receipts.append(delete(database, project, *more))
    file.write_text("\n".join(map(json.dumps, receipts)))
    nobody = run(database, "again", str(file))
    assert (nobody.returncode, nobody.stdout) == (0, ""), nobody.stderr
    database.scatter(project, "neighbour", "n")
    anonymous = make_message(project, "back")
    anonymous.attributes["user.anonymous_id"] = "a1"
    database.bury(anonymous)
    database.store([make_message(project, "back", user_id=USER)])
    back = {"project_id": project, "user_id": USER, "anonymous_ids": ["a1"]}
    assert json.loads(run(database, "again", str(file)).stdout) == back
    done = run(database, "again", "--yes", "--no-wait", str(file))
    assert json.loads(done.stdout)["digests"] == receipts[0]["digests"]
    assert run(database, "export", "--project", project, *options).stdout == ""
    assert (
        len(run(database, "export", "--project", project, "--user", "n").stdout.splitlines()) == 5
    )
    other = run(database, "again", str(file), more={"PRIVACY_SECRET": KEY[::-1]})
    assert "under another PRIVACY_SECRET" in other.stderr


@pytest.fixture
def bench(database: PersonDatabase) -> Iterator[Bench]:
    """Provide stand-ins of both providers for the test's database."""
    with AmplitudeServer(SECRET) as one, MixpanelServer(SECRET) as other:
        yield Bench(database.url, {"amplitude": one, "mixpanel": other})


def test_others_are_delivered_once_while_a_person_is_deleted(
    bench: Bench, database: PersonDatabase, project: str
) -> None:
    """While lanes forward, a deletion waits for what is being sent; others' events come once."""
    for server in bench.servers.values():
        server.behave = lambda _: time.sleep(0.02)
    for group in range(60):
        names = [f"{group}-{place}" for place in range(30)]
        users = [(USER, "n1", "n2")[place % 3] for place in range(30)]
        database.store(
            [make_message(project, n, user_id=u) for n, u in zip(names, users, strict=True)]
        )
    with bench.forwarding(), connected(open_engine(database.url)) as connection:
        deletion = Deletion(connection, Person(project, USER), Digests(KEY), lambda _: None)
        receipt = deletion.run(wait=False)
        wait_until(bench.is_done)
    assert receipt.deleted["events"] == 600
    for server in bench.servers.values():
        sent = Counter(delivery.insert_id for delivery in tuple(server.deliveries))
        assert set(sent.values()) == {1}
        assert bench.read_stored() <= set(sent)
    assert len(bench.read_stored()) == 1200


def test_a_payload_being_sent_is_waited_for(database: PersonDatabase, project: str) -> None:
    """A payload under a lease is rewritten when the lease ends, and not before."""
    database.store([make_message(project, "own", user_id="u"), make_message(project, "other")])
    lease = f"lease = '{uuid.uuid4()}', due_at = now() + interval '1 hour'"
    database.query(f"UPDATE outbox_deliveries SET {lease} WHERE provider = 'mixpanel'")
    counts = "SELECT event_count, count(*) FROM outbox_deliveries GROUP BY 1"
    waits: list[tuple[str, list[Any]]] = []

    def end_lease(said: str) -> None:
        waits.append((said, database.query(counts)))
        database.query(END_LEASES)

    with connected(open_engine(database.url)) as connection:
        Deletion(connection, Person(project, "u"), Digests(KEY), end_lease).run(wait=False)
    assert waits == [("waiting for 1 payloads that are being sent", [(2, 2)])]
    assert database.query(counts) == [(1, 2)]


def send_mixed(tenant: Tenant, number: int) -> list[str]:
    """Send a batch of the person and of neighbours, an invalid event of each among them."""
    users = (USER, "n1", "n2")
    events = [
        tenant.make_event({"event_id": f"{number}-{place}", "user.id": users[place % 3]})
        for place in range(30)
    ]
    for event in events[-3:]:
        event["event.type"] = "ui.hover"
    assert tenant.post_events(events)["accepted"] == 27
    return [event["event_id"] for event in events[:-3] if event["user.id"] != USER]


def stores_person(tenant: Tenant) -> bool:
    """Return whether an event of the person is stored that is sent now."""
    event = tenant.make_event({"event_id": uuid.uuid4().hex, "user.id": USER})
    assert tenant.post_events([event])["accepted"] == 1
    with tenant.database.cursor() as cursor:
        cursor.execute("SELECT 1 FROM events WHERE event_id = %s", [event["event_id"]])
        return cursor.fetchone() is not None


@pytest.mark.slow
def test_a_deletion_under_load_survives_being_killed(
    database: PersonDatabase, bench: Bench, open_directory: Path
) -> None:
    """Killed again and again under load, it leaves nothing; neighbours are stored and sent once."""
    settings = {"DATABASE_URL": database.url, "PRIVACY_SECRET": KEY}
    stop, sent = threading.Event(), list[str]()

    def send(tenant: Tenant) -> None:
        number = 0
        while not stop.is_set():
            sent.extend(send_mixed(tenant, number))
            number += 1
            time.sleep(0.05)

    with ExitStack() as stack:
        service = stack.enter_context(
            running_service(settings | enable_providers(bench.servers, SECRET))
        )
        tenant = stack.enter_context(open_tenant(service))
        threads = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(stop.set)
        sending = threads.submit(send, tenant)
        person = ("--project", tenant.project.id, "--user", USER)
        wait_until(lambda: len(sent) > 500)
        assert service.run("person", "block", *person).returncode == 0
        command = [sys.executable, "-m", "server", "person", "delete", *person, "--yes"]
        for seconds in (1.0, 1.3, 1.6, 2.0):
            with subprocess.Popen(
                command,
                env=clean_environment(settings),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ) as process:
                time.sleep(seconds)
                process.kill()
        delete(database, tenant.project.id, "--user", USER)
        wait_until(lambda: not stores_person(tenant))
        stop.set()
        sending.result()
        wait_until(bench.is_done)
        database.query(LATER, tenant.project.id)
        receipt = delete(database, tenant.project.id, "--user", USER)
    assert receipt["finished_at"] is not None
    assert find_traces(dump(database, open_directory), USER) == Counter()
    stored = [row for (row,) in database.query("SELECT event_id FROM events")]
    assert sorted(stored) == sorted(sent)
    for server in bench.servers.values():
        arrived = Counter(delivery.insert_id for delivery in tuple(server.deliveries))
        assert set(arrived.values()) == {1}
        assert bench.read_stored() <= arrived.keys()
