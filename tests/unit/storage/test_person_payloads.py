"""A person's events leave payloads whatever lanes do, and those of others are delivered once."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any
from uuid import UUID, uuid4

import psycopg2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2.extensions import cursor as Cursor

from productgraph.v1.event_pb2 import Event
from server.events.encoded_events_pb2 import EncodedEvents
from server.events.persons import Person, read_ids
from server.protocols import GRPC
from server.storage.connection import Connection, Engine, connected
from server.storage.outbox import (
    ClaimLimits,
    Death,
    Delivery,
    Lease,
    Outcome,
    claim_batch,
    record_outcomes,
)
from server.storage.person_payloads import rewrite_payload
from tests.support.database import PROVIDERS, Database
from tests.support.events import make_message

LANES = st.sampled_from(PROVIDERS)
FATES = st.lists(st.sampled_from(["done", "dead", "later", "now"]), min_size=1, max_size=5)
STEPS = st.lists(
    st.tuples(st.just("claim"), LANES, st.none())
    | st.tuples(st.just("record"), LANES, FATES)
    | st.tuples(st.just("end leases"), st.none(), st.none())
    | st.tuples(st.just("delete"), st.sampled_from("xyz"), st.none()),
    max_size=14,
)
OWNERS = st.lists(st.text("xyz", min_size=1, max_size=6), min_size=1, max_size=3)
EMPTY = """
DELETE FROM events; DELETE FROM outbox_deliveries; DELETE FROM outbox_payloads;
DELETE FROM dead_events
"""
BROKEN = """
SELECT count(*) FROM outbox_payloads p FULL JOIN outbox_deliveries d ON d.payload_id = p.id
 WHERE p.id IS NULL OR d.id IS NULL
    OR d.event_count <> coalesce(cardinality(d.positions), p.event_count)
    OR p.event_count <= coalesce((SELECT max(place) FROM unnest(d.positions) AS place), 0)
"""


@pytest.fixture(scope="module")
def connection(engine: Engine) -> Iterator[Connection]:
    """Provide a connection that lanes and the deletion use in turn."""
    with connected(engine) as connection:
        yield connection


@pytest.fixture(scope="module")
def beside(url: str) -> Iterator[Cursor]:
    """Provide a cursor that looks on, and changes times."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        yield cursor


class World:
    """Lanes that forward the events of some users, some of whom are deleted meanwhile."""

    def __init__(self, connection: Connection, beside: Cursor) -> None:
        self.connection = connection
        self.beside = beside
        beside.execute(EMPTY)
        self.settled: dict[str, Counter[str]] = {name: Counter() for name in PROVIDERS}
        self.claims: dict[str, list[tuple[UUID, Delivery]]] = defaultdict(list)
        self.wanted: set[str] = set()
        self.deleted: set[str] = set()

    def query(self, statement: str, *parameters: object) -> list[Any]:
        """Run a statement beside the lanes and return its rows."""
        self.beside.execute(statement, parameters)
        return self.beside.fetchall()

    def claim(self, lane: str) -> None:
        """Let a lane claim a payload, in which nobody is whose deletion is complete."""
        lease = Lease(uuid4(), 3600)
        for delivery in claim_batch(self.connection, lane, lease, ClaimLimits(1, 1)):
            assert not {owner_of(event) for event in delivery.events.values()} & self.deleted
            self.claims[lane].append((lease.id, delivery))

    def record(self, lane: str, fates: Sequence[str]) -> None:
        """Let a lane record what became of its last claim."""
        if not self.claims[lane]:
            return
        lease, delivery = self.claims[lane].pop()
        outcome = Outcome(delivery)
        for number, position in enumerate(delivery.events):
            fate = fates[number % len(fates)]
            if fate == "done":
                outcome.done.add(position)
            elif fate == "dead":
                outcome.dead[position] = Death("refused", "")
            elif fate == "later":
                outcome.delays[position] = 3600.0
        is_owner = self.query(
            "SELECT 1 FROM outbox_deliveries WHERE id = %s AND lease = %s", delivery.id, str(lease)
        )
        record_outcomes(self.connection, lane, lease, [outcome])
        if is_owner:
            self.settled[lane].update(
                id_of(delivery.events[position]) for position in outcome.done | outcome.dead.keys()
            )

    def end_leases(self) -> None:
        """Let all leases end, and all delays."""
        self.beside.execute("UPDATE outbox_deliveries SET due_at = now()")

    def delete(self, user: str) -> None:
        """Delete a user from all payloads that are not being sent."""
        self.wanted.add(user)
        person = Person("p", user)
        busy = False
        for (number,) in self.query("SELECT id FROM outbox_payloads"):
            with self.connection.begin():
                taken = rewrite_payload(
                    self.connection, number, lambda event: not person.owns(read_ids(GRPC, event))
                )
            busy = busy or taken is None
        if not busy:
            self.deleted.add(user)
        assert self.query(BROKEN) == [(0,)]

    def finish(self) -> None:
        """Complete the deletions, and let the lanes deliver all that is left."""
        self.end_leases()
        for user in self.wanted:
            self.delete(user)
        assert self.deleted == self.wanted
        for lane in PROVIDERS:
            while self.query("SELECT 1 FROM outbox_deliveries WHERE provider = %s", lane):
                self.claim(lane)
                self.record(lane, ["done"])
        assert self.query("SELECT count(*) FROM outbox_payloads") == [(0,)]


def owner_of(event: bytes) -> str:
    """Return the user of an event."""
    return Event.FromString(event).user_id


def id_of(event: bytes) -> str:
    """Return the id of an event."""
    return Event.FromString(event).event_id


@settings(
    max_examples=50,
    # The list takes the place of the profile's, which is for busy machines.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(groups=OWNERS, steps=STEPS)
def test_others_are_delivered_once_whoever_is_deleted(
    url: str,
    connection: Connection,
    beside: Cursor,
    groups: list[str],
    steps: list[tuple[str, str, list[str]]],
) -> None:
    """Whoever is deleted at whatever progress of lanes: each lane settles others' events once."""
    world, database = World(connection, beside), Database(url)
    everybody: dict[str, str] = {}
    for number, owners in enumerate(groups):
        ids = {f"{number}-{place}": owner for place, owner in enumerate(owners)}
        database.store([make_message("p", each, user_id=ids[each]) for each in ids])
        everybody |= ids
    for step, who, fates in steps:
        if step == "claim":
            world.claim(who)
        elif step == "record":
            world.record(who, fates)
        elif step == "delete":
            world.delete(who)
        else:
            world.end_leases()
    world.finish()
    others = {each for each, owner in everybody.items() if owner not in world.deleted}
    for settled in world.settled.values():
        assert {each for each in settled if each in others} == others
        assert set(settled.values()) <= {1}


def test_a_payload_that_is_recorded_meanwhile_is_left(
    url: str, connection: Connection, beside: Cursor
) -> None:
    """While a forwarder records an outcome, its payload is busy, and nobody waits for anybody."""
    beside.execute(EMPTY)
    database = Database(url)
    database.store([make_message("p", name, user_id=name) for name in ("x", "y")])
    [(number,)] = database.query("SELECT id FROM outbox_payloads")
    lock = "SELECT id FROM outbox_deliveries WHERE provider = 'mixpanel' FOR UPDATE"
    with closing(psycopg2.connect(url)) as other, other.cursor() as cursor:
        cursor.execute(lock)
        with connection.begin():
            assert rewrite_payload(connection, number, lambda _: False) is None
        other.rollback()
    with connection.begin():
        assert rewrite_payload(connection, number, lambda event: owner_of(event) == "y") == 1
    [(events, count)] = database.query("SELECT events, event_count FROM outbox_payloads")
    kept = EncodedEvents.FromString(bytes(events)).events
    assert (list(map(owner_of, kept)), count) == (["y"], 1)
