"""API keys that are replaced and that end, as clients and operators see it."""

import json
import threading
import time
from collections import Counter
from contextlib import closing
from typing import Any

import pytest

from tests.support.clients import Tenant
from tests.support.events import make_event
from tests.support.load import HttpClient, send
from tests.support.services import Service, wait_until


def make_key(tenant: Tenant, *options: str) -> tuple[str, str]:
    """Return a new key of the tenant's project, and its number."""
    made = tenant.service.run("keys", "create", "--project", tenant.project.id, *options)
    assert made.returncode == 0, made.stderr
    listed = map(json.loads, tenant.service.run("keys", "list", "--json").stdout.splitlines())
    return made.stdout.strip(), str([key["id"] for key in listed][-1])


def show(service: Service, number: str) -> dict[str, Any]:
    """Return what `keys show` tells programs."""
    shown: dict[str, Any] = json.loads(service.run("keys", "show", number, "--json").stdout)
    return shown


def post(service: Service, project: str, key: str) -> str:
    """Send an event with a key, and return the status."""
    with closing(HttpClient(service, key)) as client:
        return send(client, [make_event(project)])


def test_a_rotated_key_and_the_next_both_work(tenant: Tenant) -> None:
    """`keys rotate` prints a key like the old one, which works on until its grace ends."""
    run = tenant.service.run
    old, number = make_key(tenant, "--name", "web", "--rate", "500", "--expires", "90d")
    done = run("keys", "rotate", number, "--grace", "3d")
    assert (done.returncode, done.stderr) == (0, "")
    new = done.stdout.strip()
    for key in (old, new):
        assert post(tenant.service, tenant.project.id, key) == "202"
    replaced = show(tenant.service, number)
    next_one = show(tenant.service, str(replaced["replaced_by"]))
    assert next_one["replaces"] == replaced["id"]
    assert [next_one[name] for name in ("name", "event_rate")] == ["web", 500]
    assert replaced["ends_at"] == replaced["retires_at"] < next_one["expires_at"]
    again = run("keys", "rotate", number)
    assert (again.returncode, again.stdout) == (1, "")
    assert f"key {next_one['id']}" in again.stderr
    assert (
        run("keys", "rotate", "999999999").returncode,
        run("keys", "show", "9" * 9).returncode,
    ) == (1, 1)
    lines = run("keys", "show", number).stdout
    for fact in (
        f"replaced by  key {next_one['id']}",
        "rate         500",
        f"expires      {replaced['ends_at'][:10]}",
    ):
        assert fact in lines
    assert not [key for key in (old, new) if key in lines]


@pytest.mark.parametrize("age", ["0d", "7", "soon", "-1d"])
def test_a_life_of_a_key_needs_a_unit(age: str, service: Service) -> None:
    """A life that is no age makes no key."""
    done = service.run("keys", "create", "--project", "p", "--expires", age)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--expires" in done.stderr


@pytest.mark.slow
def test_rotation_under_load_refuses_nobody(tenant: Tenant) -> None:
    """Clients that change to the next key within the grace never get a 401; the old key ends."""
    first, number = make_key(tenant)
    keys, statuses, stop = [first], Counter[str](), threading.Event()

    def press() -> None:
        while not stop.is_set():
            key = keys[-1]
            with closing(HttpClient(tenant.service, key)) as client:
                while not stop.is_set() and key == keys[-1]:
                    statuses[send(client, [make_event(tenant.project.id) for _ in range(10)])] += 1

    pressing = [threading.Thread(target=press) for _ in range(4)]
    for thread in pressing:
        thread.start()
    for _ in range(4):
        new = tenant.service.run("keys", "rotate", number, "--grace", "20s").stdout.strip()
        time.sleep(2.0)
        keys.append(new)
        time.sleep(1.0)
        number = str(show(tenant.service, number)["replaced_by"])
    wait_until(lambda: post(tenant.service, tenant.project.id, first) == "401")
    stop.set()
    for thread in pressing:
        thread.join()
    assert set(statuses) == {"202"}, statuses
    assert statuses["202"] > 100
