"""`person delete --providers`: asked for by the command, sent by forwarders, shown by `status`."""

import json
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server import failpoints
from server.events.persons import Person
from tests.service.test_person_delete import dump, find_traces
from tests.support.database import PROVIDERS
from tests.support.deletion_servers import AmplitudeDeletionServer, MixpanelDeletionServer
from tests.support.deletions import LATER, DeletionBench
from tests.support.events import make_message
from tests.support.forwarding import SECRET, Bench
from tests.support.provider_servers import AmplitudeServer, MixpanelServer
from tests.support.services import run_command, wait_until

USER = "žofie o'neill\"x <z@example.org>"
END_LEASES = "UPDATE provider_deletions SET due_at = now() WHERE state = 'waiting'"


@pytest.fixture
def deletions(create_migrated: Callable[[], str]) -> Iterator[DeletionBench]:
    """Provide a database of the test's own, and what its deletions are asked of."""
    with AmplitudeDeletionServer() as one, MixpanelDeletionServer() as other:
        yield DeletionBench(create_migrated(), {"amplitude": one, "mixpanel": other})


def run(
    deletions: DeletionBench, command: str, *options: str, user: str = USER, **more: str
) -> "subprocess.CompletedProcess[str]":
    """Run `productgraph person` for a user."""
    person = ("--project", "p", "--user", user)
    return run_command("person", command, *person, *options, settings=deletions.settings | more)


def delete(deletions: DeletionBench, *options: str) -> dict[str, Any]:
    """Delete the user, and return the receipt."""
    done = run(deletions, "delete", "--yes", "--no-wait", *options)
    assert done.returncode == 0, done.stderr
    receipt: dict[str, Any] = json.loads(done.stdout)
    return receipt


def read_states(deletions: DeletionBench) -> dict[str, str]:
    """Return the states of the newest receipt by `person status`."""
    done = run(deletions, "status", "--json")
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)["receipts"][-1]
    return {each["provider"]: each["state"] for each in receipt["providers"]}


def test_deletions_survive_a_killed_forwarder_without_an_id_in_clear(
    deletions: DeletionBench, open_directory: Path, tmp_path: Path
) -> None:
    """From the command to the providers no dump has the id, and killing loses nothing."""
    deletions.scatter("p", "own", USER)
    assert find_traces(dump(deletions, open_directory), USER)
    planned = delete(deletions, "--providers")
    assert planned["providers"] == [{"provider": name, "state": "planned"} for name in PROVIDERS]
    assert deletions.query("SELECT count(*) FROM provider_deletions") == [(0,)]
    deletions.query(LATER)
    # The wish is the receipt's: it needs not be repeated.
    waiting = delete(deletions)
    assert {each["state"] for each in waiting["providers"]} == {"waiting"}
    assert find_traces(dump(deletions, open_directory), USER) == Counter()
    bench = Bench(deletions.url, {})
    armed = deletions.settings | {"PRODUCTGRAPH_FAILPOINTS": str(tmp_path)}
    (tmp_path / failpoints.AFTER_PROVIDER).touch()
    with bench.process(armed) as process:
        assert process.wait(60) == -9
    assert "waiting" in read_states(deletions).values()
    deletions.query(END_LEASES)
    with bench.process(armed):
        wait_until(lambda: set(read_states(deletions).values()) == {"accepted"})
    assert {name: server.deleted for name, server in deletions.servers.items()} == {
        name: {USER} for name in PROVIDERS
    }
    shown = run(deletions, "status").stdout
    assert "amplitude: accepted since" in shown
    assert "job 2031-02-28, staging" in shown
    assert find_traces(dump(deletions, open_directory), USER) == Counter()


def test_status_shows_why_a_provider_deletes_nobody(deletions: DeletionBench) -> None:
    """Wrong credentials are in `person status`, with the next try; they are in no text."""
    deletions.delete(Person("p", USER))
    for server in deletions.servers.values():
        access, server.secret = server.access(), "another"
        name = next(name for name, each in deletions.servers.items() if each is server)
        assert deletions.ask(name, access)
    shown = run(deletions, "status").stdout.splitlines()
    receipt, *lines = shown[1:]
    assert receipt.startswith("receipt ")
    for name, (state, error, next_try) in zip(PROVIDERS, (lines[:3], lines[3:]), strict=True):
        assert state.startswith(f"  {name}: waiting since ")
        assert "last error at" in error
        assert "401" in error
        assert next_try.startswith("    next try at ")
    assert "deletion-s3cret" not in "".join(shown)


@pytest.mark.parametrize(
    ("settings", "variables"),
    [
        (
            {"AMPLITUDE_SECRET_KEY": "", "MIXPANEL_GDPR_TOKEN": ""},
            "AMPLITUDE_SECRET_KEY and MIXPANEL_GDPR_TOKEN",
        ),
        (
            {"ANALYTICS_ENABLED": "true", "MIXPANEL_ENABLED": "true", "MIXPANEL_GDPR_TOKEN": ""},
            "MIXPANEL_GDPR_TOKEN",
        ),
    ],
    ids=["neither", "one"],
)
def test_providers_without_credentials_are_no_surprise_later(
    deletions: DeletionBench, settings: dict[str, str], variables: str
) -> None:
    """If a provider that has events cannot be asked, nothing is deleted, and the variable named."""
    deletions.scatter("p", "own", USER)
    done = run(deletions, "delete", "--yes", "--no-wait", "--providers", **settings)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(f"--providers needs {variables}\n")
    assert deletions.query("SELECT count(*) FROM events") == [(1,)]
    assert deletions.query("SELECT count(*) FROM person_deletions") == [(0,)]


def test_whom_a_restore_brings_back_is_deleted_at_providers_too(
    deletions: DeletionBench, tmp_path: Path
) -> None:
    """`person again --providers` asks the providers for everybody whom it deletes."""
    file = tmp_path / "receipts"
    file.write_text(json.dumps(delete(deletions)))
    deletions.query("TRUNCATE person_deletions")
    options = ("again", "--yes", "--no-wait", "--providers", str(file))
    for state in ("planned", "waiting"):
        deletions.scatter("p", state, USER)
        done = run_command("person", *options, settings=deletions.settings)
        assert done.returncode == 0, done.stderr
        [receipt] = map(json.loads, done.stdout.splitlines())
        assert [each["state"] for each in receipt["providers"]] == [state, state]
        deletions.query(LATER)
    assert deletions.query("SELECT count(*) FROM person_deletions") == [(1,)]


def test_nothing_of_a_person_reaches_a_provider_after_its_deletion(
    deletions: DeletionBench,
) -> None:
    """Events that wait are deleted and those being sent are waited for, before it is asked."""
    with AmplitudeServer(SECRET) as one, MixpanelServer(SECRET) as other:
        events = {"amplitude": one, "mixpanel": other}
        bench = Bench(deletions.url, events)
        for group in range(20):
            users = [(USER, "n1")[place % 2] for place in range(20)]
            deletions.store(
                [make_message("p", f"{group}-{n}", user_id=user) for n, user in enumerate(users)]
            )
        with bench.forwarding():
            deletions.delete(Person("p", USER))
            assert all(deletions.ask(name) for name in PROVIDERS)
            wait_until(bench.is_done)
        for name, server in events.items():
            wanted = USER.split()[0].encode()
            own = [each for each in tuple(server.deliveries) if wanted in each.payload]
            asked = deletions.servers[name].asked[0].at
            assert all(each.arrived_at < asked for each in own)
            assert len(server.insert_ids) >= 200
