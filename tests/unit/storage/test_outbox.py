"""The outbox holds each newly stored event for each provider, until that one is done with it."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg2
import pytest
from sqlalchemy import text

from productgraph.v1.event_pb2 import Event
from server.events.copy_rows import Row
from server.events.encoded_events_pb2 import EncodedEvents
from server.events.timestamps import END_SECOND, FIRST_SECOND
from server.storage.connection import Connection, Engine, connected
from server.storage.dead_events import DeadEvent, list_dead, purge_dead, retry_dead
from server.storage.errors import Conflict, Refused
from server.storage.events import EventStore
from server.storage.lanes import LaneState, find_abandoned, read_status, show_lane
from server.storage.outbox import (
    _FIND_DUE,
    _FIND_PROJECTS,
    ClaimLimits,
    Death,
    Delivery,
    Lease,
    Outbox,
    Outcome,
    bury_expired,
    claim_batch,
    count_waiting,
    purge_waiting,
    record_outcomes,
)
from tests.support.clients import Tenant
from tests.support.events import ENCODER, make_row

TABLES = ("outbox_payloads", "outbox_deliveries", "dead_events", "forward_lanes")
ORPHANS = """
SELECT (SELECT count(*) FROM outbox_payloads p WHERE NOT EXISTS
           (SELECT FROM outbox_deliveries d WHERE d.payload_id = p.id)),
       (SELECT count(*) FROM outbox_deliveries d WHERE NOT EXISTS
           (SELECT FROM outbox_payloads p WHERE p.id = d.payload_id))
"""

Query = Callable[..., list[Any]]


@pytest.fixture
def query(url: str) -> Iterator[Query]:
    """Run statements beside the service, on an outbox that is empty at first."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True

        def run(statement: str, *parameters: Any) -> list[Any]:
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

        run(f"TRUNCATE events, {', '.join(TABLES)}")
        yield run


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    """Provide a connection such as a forwarder's."""
    with connected(engine) as connection:
        yield connection


@pytest.fixture
def save(query: Query, engine: Engine) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Store a group of rows, and keep what was new for the providers `a` and `b`."""
    assert query(ORPHANS) == [(0, 0)]
    store = make_store("a", "b")
    with connected(engine) as connection:
        yield lambda rows: store.save(connection, rows, 5)


Save = Callable[[Sequence[Row]], None]


def make_store(*providers: str) -> EventStore:
    """Return a store that keeps what is new for these providers."""
    return EventStore(ENCODER.columns, Outbox(providers, 1).statements_for)


def make_rows(project: str, count: int) -> list[Row]:
    """Rows of events that differ in their ids, which sort as they stand."""
    return [make_row(project, f"e{number:05}") for number in range(count)]


def read_queued(query: Query) -> list[list[tuple[str, str]]]:
    """Project and id of the events of each payload."""
    payloads = query("SELECT events FROM outbox_payloads ORDER BY id")
    return [[(e.project_id, e.event_id) for e in read_frames(events)] for (events,) in payloads]


def read_frames(payload: bytes) -> list[Event]:
    """Return the events of a payload."""
    return [Event.FromString(event) for event in EncodedEvents.FromString(bytes(payload)).events]


def read_ids(letters: Sequence[DeadEvent]) -> list[str]:
    """Return the ids of dead events."""
    return [Event.FromString(letter.event).event_id for letter in letters]


def claim(
    connection: Connection,
    provider: str = "a",
    count: int = 1000,
    size: int = 1 << 30,
    after: str | None = None,
) -> tuple[UUID, list[Delivery]]:
    """Return a new lease of a minute, and what was claimed under it."""
    lease = Lease(uuid4(), 60)
    return lease.id, claim_batch(connection, provider, lease, ClaimLimits(count, size), after)


def finish(
    connection: Connection, provider: str, lease: UUID, deliveries: Sequence[Delivery]
) -> None:
    """Record that the provider has everything."""
    outcomes = [Outcome(delivery, done=set(delivery.events)) for delivery in deliveries]
    record_outcomes(connection, provider, lease, outcomes)


def test_events_and_deliveries_share_one_transaction(save: Save, query: Query) -> None:
    """Events, payloads and deliveries are written by one and the same transaction."""
    for group in (make_rows("p", 3), make_rows("p", 5)):  # straight, then staged
        save(group)
    writers = query("SELECT xmin::text, count(*) FROM events GROUP BY 1 ORDER BY 2 DESC")
    kept = query("SELECT xmin::text, event_count FROM outbox_payloads ORDER BY id")
    assert writers == kept
    assert [count for _, count in kept] == [3, 2]
    deliveries = (
        "SELECT xmin::text, provider, event_count FROM outbox_deliveries ORDER BY 3 DESC, 2"
    )
    assert query(deliveries) == [(*row[:1], p, row[1]) for row in kept for p in "ab"]


def test_no_event_is_stored_without_its_delivery(save: Save, query: Query) -> None:
    """Where the outbox refuses a group, none of its events is stored."""
    query("ALTER TABLE outbox_payloads ADD CONSTRAINT broken CHECK (project_id <> 'bad') NOT VALID")
    try:
        with pytest.raises(Refused):
            save([make_row("bad", "e"), make_row("good", "e")])
    finally:
        query("ALTER TABLE outbox_payloads DROP CONSTRAINT broken")
    assert query("SELECT count(*) FROM events") == [(0,)]
    assert read_queued(query) == []


def test_a_group_makes_one_payload_per_project(save: Save, query: Query) -> None:
    """A group makes one payload for each project, and one delivery of it for each provider."""
    names = [f"p{number:03}" for number in range(250)]
    save([make_row(name, f"e{number}") for number in (2, 1) for name in names])
    assert read_queued(query) == [[(name, "e1"), (name, "e2")] for name in names]
    assert query("SELECT provider, count(*) FROM outbox_deliveries GROUP BY 1 ORDER BY 1") == [
        ("a", 250),
        ("b", 250),
    ]
    assert query("SELECT DISTINCT mapping_version, event_count FROM outbox_payloads") == [(1, 2)]


def test_no_payload_exceeds_a_thousand_events(save: Save, query: Query) -> None:
    """No payload has more than a thousand events."""
    save(make_rows("p", 2001))
    assert [len(payload) for payload in read_queued(query)] == [1000, 1000, 1]


def test_a_repeated_event_is_queued_only_once(save: Save, query: Query) -> None:
    """An event sent again, in its batch or later, staged or not, is queued when it is stored."""
    groups = ["aab", "bcc", "ad", "abcd", "eea"]
    for group in groups:
        save([make_row("p", name, event_name=f"{i}") for i, name in enumerate(group)])
    queued = ["ab", "c", "d", "e"]
    assert read_queued(query) == [[("p", name) for name in group] for group in queued]
    names = "SELECT event_id, event_name FROM events ORDER BY 1"
    kept = query("SELECT events FROM outbox_payloads")
    assert sorted((e.event_id, e.event_name) for (k,) in kept for e in read_frames(k)) == query(
        names
    )


def test_staged_rows_are_recognised_whatever_their_keys(save: Save, query: Query) -> None:
    """What the staging table returns is recognised, whatever the ids and the timestamps."""
    save([make_row("p", "e")])
    moments = [FIRST_SECOND, -1, 0, 253_370_764_800, END_SECOND - 1]
    rows = [make_row("p", "e"), make_row("p", "e", nanos=1000)]
    rows += [make_row("p", "t", seconds=second, nanos=999_999_000) for second in moments]
    rows += [make_row(odd, odd) for odd in ("\\", "\t", "a\nb", "'", "%s", "\\.", "😀", "é", " ")]
    save(rows)
    assert sum(map(len, read_queued(query))) == len(rows)
    assert query("SELECT count(*) FROM events") == [(len(rows),)]


def test_concurrent_duplicates_are_queued_once(save: Save, query: Query, engine: Engine) -> None:
    """Events that four writers store at the same moment are queued once."""
    save([make_row("p", "first")])
    start = threading.Barrier(4)

    def save_all(rows: list[Row]) -> None:
        store = make_store("a", "b")
        with connected(engine) as connection:
            start.wait(60)
            while True:
                with suppress(Conflict):
                    return store.save(connection, rows, 60)

    for number in range(10):
        rows = make_rows(f"p{number}", 100)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(save_all, [rows] * 4))
    queued = Counter(event for payload in read_queued(query) for event in payload)
    assert len(queued) == 1001
    assert set(queued.values()) == {1}


def test_the_outbox_stays_empty_without_analytics(tenant: Tenant) -> None:
    """With analytics off the service leaves the outbox alone."""

    def count_rows() -> list[int]:
        with tenant.database.cursor() as cursor:
            cursor.execute("SELECT " + ", ".join(f"(SELECT count(*) FROM {t})" for t in TABLES))
            return list(cursor.fetchone() or ())

    before = count_rows()  # tests of other modules may have left rows
    for _ in range(2):
        assert tenant.post_events(tenant.make_events(5))["accepted"] == 5
    assert count_rows() == before


def test_payloads_of_the_first_release_stay_readable(query: Query, connection: Connection) -> None:
    """A payload of the first release is read for ever: these bytes, events in field 1."""
    events = [Event(event_id=event_id).SerializeToString() for event_id in ("e1", "e2")]
    payload = b"".join(b"\x0a" + bytes([len(event)]) + event for event in events)
    query(
        "WITH kept AS (INSERT INTO outbox_payloads (project_id, mapping_version, event_count,"
        " events) VALUES ('p', 1, 2, %s) RETURNING id)"
        " INSERT INTO outbox_deliveries (payload_id, provider, event_count)"
        " SELECT id, 'a', 2 FROM kept",
        payload,
    )
    [delivery] = claim(connection)[1]
    assert delivery.events == dict(enumerate(events))


def test_payloads_are_uncompressed_and_vacuumed_often(query: Query) -> None:
    """Payloads are not compressed, and the queue's tables are vacuumed by thousands of rows."""
    assert query(
        "SELECT attstorage::text FROM pg_attribute WHERE attname = 'events'"
        " AND attrelid = 'outbox_payloads'::regclass"
    ) == [("e",)]
    options = query(
        "SELECT reloptions FROM pg_class WHERE relname IN ('outbox_payloads', 'outbox_deliveries')"
    )
    assert all("autovacuum_vacuum_scale_factor=0" in option for (option,) in options)


def test_lanes_ending_together_leave_no_payload(save: Save, query: Query, engine: Engine) -> None:
    """Lanes that end the same payload at once leave neither payload nor delivery, 200 times."""
    rounds, meet = 200, threading.Barrier(2)
    for number in range(rounds):
        save([make_row("p", f"e{number}")])

    def run(provider: str) -> None:
        with connected(engine) as connection:
            lease, deliveries = claim(connection, provider)
            assert len(deliveries) == rounds
            for delivery in deliveries:
                meet.wait(60)
                finish(connection, provider, lease, [delivery])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, "ab"))
    assert query(ORPHANS) == [(0, 0)]
    assert read_queued(query) == []
    assert query("SELECT provider, delivered FROM forward_lanes ORDER BY 1") == [
        ("a", rounds),
        ("b", rounds),
    ]


def test_a_payload_stays_while_a_provider_wants_it(
    save: Save, query: Query, connection: Connection
) -> None:
    """A payload stays for as long as one provider wants any of it."""
    save(make_rows("p", 2))
    lease, [delivery] = claim(connection, "a")
    finish(connection, "a", lease, [delivery])
    lease, [delivery] = claim(connection, "b")
    record_outcomes(connection, "b", lease, [Outcome(delivery, done={1})])
    assert len(read_queued(query)) == 1
    lease, [delivery] = claim(connection, "b")
    assert list(delivery.events) == [0]
    finish(connection, "b", lease, [delivery])
    assert read_queued(query) == []


def test_four_claimers_share_everything_without_overlap(
    save: Save, engine: Engine, query: Query
) -> None:
    """Four claimers at once share everything out, and no delivery twice."""
    for number in range(200):
        save([make_row("p", f"e{number}")])
    start = threading.Barrier(4)

    def run(_: int) -> list[int]:
        claimed: list[int] = []
        with connected(engine) as connection:
            start.wait(60)
            while query_due(connection):
                claimed += [delivery.id for delivery in claim(connection, count=3)[1]]
        return claimed

    with ThreadPoolExecutor(4) as threads:
        shares = list(threads.map(run, range(4)))
    assert Counter(i for share in shares for i in share) == Counter(
        i for (i,) in query("SELECT id FROM outbox_deliveries WHERE provider = 'a'")
    )


def query_due(connection: Connection) -> int:
    """How many deliveries to `a` may be claimed."""
    due = "SELECT count(*) FROM outbox_deliveries WHERE provider = 'a' AND due_at <= now()"
    with connection.begin():
        count: int = connection.exec_driver_sql(due).scalar_one()
    return count


def test_a_claim_skips_what_another_has_locked(save: Save, engine: Engine, query: Query) -> None:
    """A claim does not wait for what another one has locked."""
    save([make_row("p", "e1")])
    save([make_row("p", "e2")])
    with ExitStack() as stack:
        one, other = (stack.enter_context(connected(engine)) for _ in "12")
        stack.enter_context(one.begin())
        one.exec_driver_sql(
            "SELECT FROM outbox_deliveries WHERE provider = 'a' ORDER BY id LIMIT 1 FOR UPDATE"
        )
        [delivery] = claim(other)[1]
    assert query("SELECT min(id) < %s FROM outbox_deliveries", delivery.id) == [(True,)]


def test_a_claim_takes_the_longest_due_events(save: Save, connection: Connection) -> None:
    """A claim takes what has been due longest, up to a number of events, one payload at least."""
    for number, size in enumerate([5, 3, 4, 1]):
        save([make_row("p", f"{number} {event}") for event in range(size)])
    assert [
        [len(delivery.events) for delivery in claim(connection, count=count)[1]]
        for count in (1, 7, 9, 9)
    ] == [[5], [3, 4], [1], []]


def test_a_lost_lease_makes_its_record_void(
    save: Save, query: Query, connection: Connection
) -> None:
    """What was claimed is back when the lease ends, and its old holder's record changes nothing."""
    save(make_rows("p", 3))
    old, [stale] = claim(connection)
    assert claim(connection)[1] == []
    within = "SELECT due_at > now() AND due_at <= now() + '60 s' FROM outbox_deliveries WHERE id=%s"
    assert query(within, stale.id) == [(True,)]
    query("UPDATE outbox_deliveries SET due_at = now() WHERE id = %s", stale.id)
    new, [fresh] = claim(connection)
    assert fresh == stale
    late = Outcome(stale, done={0}, dead={1: Death("late", "")}, delays={2: 5.0})
    record_outcomes(connection, "a", old, [late])
    state = "SELECT id, lease::text, positions, attempts FROM outbox_deliveries WHERE provider='a'"
    assert query(state) == [(stale.id, str(new), None, 0)]
    assert query("SELECT count(*) FROM dead_events") == [(0,)]
    assert query("SELECT sum(delivered) FROM forward_lanes") == [(0,)]
    finish(connection, "a", new, [fresh])
    record_outcomes(connection, "a", old, [late])
    assert query(state) == []
    assert query("SELECT delivered FROM forward_lanes") == [(3,)]


def test_what_is_left_is_due_by_its_delays(
    save: Save, query: Query, connection: Connection
) -> None:
    """What is left of a delivery is due again by its delays, and nothing else of it is."""
    save(make_rows("p", 8))
    query("DELETE FROM outbox_deliveries WHERE provider = 'b'")
    lease, [delivery] = claim(connection)
    outcome = Outcome(delivery, done={0, 3}, dead={1: Death("bad field", "answer")})
    outcome.delays = {2: 10.0, 4: 30.0, 5: 10.0, 7: 0.0}
    record_outcomes(connection, "a", lease, [outcome])
    assert query(
        "SELECT positions, event_count, attempts FROM outbox_deliveries ORDER BY due_at"
    ) == [([6, 7], 2, 0), ([2, 5], 2, 1), ([4], 1, 1)]
    dues = [due_at for (due_at,) in query("SELECT due_at FROM outbox_deliveries ORDER BY id")]
    assert [(due_at - dues[0]).total_seconds() for due_at in dues] == [0, 10, 30]
    assert dues[0] <= datetime.now(UTC)
    dead = query("SELECT provider, project_id, reason, answer, event FROM dead_events")
    assert [row[:4] for row in dead] == [("a", "p", "bad field", "answer")]
    assert Event.FromString(bytes(dead[0][4])).event_id == "e00001"
    query("UPDATE outbox_deliveries SET due_at = now()")
    again = [d for d in claim(connection)[1] if d.attempts]
    assert {p: Event.FromString(e).event_id for d in again for p, e in d.events.items()} == {
        position: f"e{position:05}" for position in (2, 4, 5)
    }


def test_every_recorded_event_ends_in_one_place(save: Save, connection: Connection) -> None:
    """Every event of what is recorded ends in one place only."""
    for number in range(6):
        save([make_row("p", f"{number} {event}") for event in range(4)])
    lease, deliveries = claim(connection)
    outcomes = [
        Outcome(d, done={0}, dead={1: Death("no", "")}, delays={2: 1.0 + d.id}) for d in deliveries
    ]
    record_outcomes(connection, "a", lease, outcomes)
    [lane, other] = read_status(connection)
    assert (lane.delivered, lane.dead, lane.pending) == (6, 6, 12)
    assert (other.delivered, other.dead, other.pending) == (0, 0, 24)
    assert lane.oldest_at == other.oldest_at is not None


def test_a_stopped_lane_shows_its_reason(save: Save, query: Query, connection: Connection) -> None:
    """A lane's stop is shown with its reason until it is over."""
    save(make_rows("p", 2))
    connection.rollback()
    show_lane(connection, "a", LaneState("bad key"))
    since = query("SELECT stopped_at FROM forward_lanes")
    show_lane(connection, "a", LaneState("still bad"))
    assert [lane.stopped_reason for lane in read_status(connection)] == ["still bad", None]
    assert query("SELECT stopped_at FROM forward_lanes") == since
    connection.rollback()
    show_lane(connection, "a", LaneState())
    assert [lane.stopped_reason for lane in read_status(connection)] == [None, None]


def test_dead_events_return_to_their_own_provider(
    save: Save, query: Query, connection: Connection
) -> None:
    """Dead events go back to their own provider with their mapping version, or go for good."""
    save(make_rows("p", 4))
    query("UPDATE outbox_payloads SET mapping_version = 7")
    for provider in "ab":
        lease, [delivery] = claim(connection, provider)
        dead = dict.fromkeys(delivery.events, Death(f"refused by {provider}", "what it said"))
        record_outcomes(connection, provider, lease, [Outcome(delivery, dead=dead)])
    assert read_queued(query) == []
    with connection.begin():
        letters = list_dead(connection, "a", 3)
        assert read_ids(letters) == ["e00003", "e00002", "e00001"]
        assert retry_dead(connection, "a", [letters[0].id, letters[1].id, 10**6]) == 2
        assert retry_dead(connection, "b", [letters[2].id]) == 0
        assert purge_dead(connection, "b", []) == 4
        assert purge_dead(connection, None, [letters[2].id]) == 1
        assert read_ids(list_dead(connection, None, 9)) == ["e00000"]
    deliveries = claim(connection)[1]
    assert {Event.FromString(d.events[0]).event_id[-1] for d in deliveries} == {"2", "3"}
    assert {(d.mapping_version, d.attempts) for d in deliveries} == {(7, 0)}
    assert claim(connection, "b")[1] == []
    assert query(ORPHANS) == [(0, 0)]


def test_a_claim_reads_little_of_a_backlog(query: Query, connection: Connection) -> None:
    """With a long backlog of some projects, a claim walks the index and reads what it may take."""
    query(
        "INSERT INTO outbox_payloads (project_id, mapping_version, event_count, events)"
        " SELECT 'p' || n %% 3, 1, 1, '' FROM generate_series(1, 10000) n"
    )
    query(
        "INSERT INTO outbox_deliveries (payload_id, provider, project_id, event_count)"
        " SELECT id, p, project_id, 1 FROM outbox_payloads, unnest('{a,b}'::text[]) p"
    )
    query("ANALYZE outbox_payloads, outbox_deliveries")
    wanted = {"provider": "a", "is_first": True, "after": "", "limit": 300, "max_events": 50}
    wanted |= {"projects": ["p0", "p1", "p2"]}
    for statement, most in ((_FIND_PROJECTS, 10), (_FIND_DUE, 1000)):
        explained = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}")
        names = {name: value for name, value in wanted.items() if f":{name}" in str(statement)}
        with connection.begin():
            [[top]] = connection.execute(explained, names)
        scans = [node for node in walk(top[0]["Plan"]) if "Scan" in node["Node Type"]]
        tables = [node for node in scans if node.get("Relation Name", "").startswith("outbox")]
        assert tables
        kinds = {(node["Node Type"], node["Relation Name"]) for node in tables}
        assert all("Index" in kind for kind, _ in kinds), kinds
        assert all(node["Actual Rows"] * node["Actual Loops"] <= most for node in tables)


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a node of a plan, and all below it."""
    yield node
    for below in node.get("Plans", []):
        yield from walk(below)


def save_groups(save: Save, *groups: tuple[str, int]) -> None:
    """Store groups of this many events of a project, one after the other."""
    for number, (project, count) in enumerate(groups):
        save([make_row(project, f"{number} {event}") for event in range(count)])


def read_projects(deliveries: Sequence[Delivery]) -> list[tuple[str, int]]:
    """Whose they are, and how many events each has."""
    return [(delivery.project_id, len(delivery.events)) for delivery in deliveries]


def test_projects_take_turns_in_a_claim(save: Save, connection: Connection) -> None:
    """A project with a backlog leaves room to others, which came later and have less."""
    save_groups(save, *[("many", 10)] * 9, ("few", 2), ("some", 10), ("some", 10))
    claimed = read_projects(claim(connection, count=45)[1])
    assert Counter(project for project, _ in claimed) == {"few": 1, "some": 2, "many": 2}


def test_a_claim_begins_after_the_last_project(save: Save, connection: Connection) -> None:
    """Claims too small for all projects go round among them."""
    save_groups(save, *[(project, 5) for _ in range(2) for project in "abc"])
    turn, seen = None, []
    for _ in range(6):
        [delivery] = claim(connection, count=5, after=turn)[1]
        turn = delivery.project_id
        seen.append(turn)
    assert seen == ["a", "b", "c", "a", "b", "c"]


def test_a_claim_is_bounded_in_bytes(save: Save, connection: Connection) -> None:
    """A claim takes payloads up to a size, at least one."""
    save_groups(save, *[("p", 10)] * 5)
    sizes = [sum(map(len, delivery.events.values())) for delivery in claim(connection)[1]]
    query_due(connection)
    connection.execute(text("UPDATE outbox_deliveries SET due_at = now()"))
    connection.commit()
    limit = round(2.5 * max(sizes))
    assert [len(claim(connection, size=size)[1]) for size in (limit, limit, 1, 1)] == [2, 2, 1, 0]


def test_large_events_make_small_payloads(save: Save, query: Query) -> None:
    """No payload is much larger than four megabytes, so that a claim can be bounded."""
    rows = [make_row("p", f"e{n:03}", ui_element_text="x" * 100_000) for n in range(100)]
    save(rows)
    sizes = [size for (size,) in query("SELECT octet_length(events) FROM outbox_payloads")]
    assert len(sizes) == 3
    assert max(sizes) <= (4 << 20) + 1000
    assert sum(map(len, read_queued(query))) == 100


def test_expired_events_are_buried_and_others_stay(
    save: Save, query: Query, connection: Connection
) -> None:
    """What is older than the limit is dead with its reason; what is leased or younger stays."""
    save_groups(save, ("p", 3), ("p", 2), ("q", 1))
    query("UPDATE outbox_payloads SET received_at = now() - '1 h'::interval WHERE event_count > 1")
    query("UPDATE outbox_deliveries SET due_at = now() + '1 h'::interval WHERE event_count = 2")
    cut = datetime.now(UTC) - timedelta(minutes=30)
    limits, death = ClaimLimits(1000, 1 << 20), Death("too old", "")
    assert [bury_expired(connection, "a", limits, cut, death) for _ in range(2)] == [3, 0]
    dead = query("SELECT provider, project_id, reason, count(*) FROM dead_events GROUP BY 1, 2, 3")
    assert dead == [("a", "p", "too old", 3)]
    assert count_waiting(connection, "a") == 3
    assert count_waiting(connection, "b") == 6
    assert query(ORPHANS) == [(0, 0)]


def test_a_purge_takes_all_of_one_provider(
    save: Save, query: Query, connection: Connection
) -> None:
    """A purge deletes what waits for one provider, and what nobody else waits for."""
    save_groups(save, ("p", 3), ("q", 1))
    query("DELETE FROM outbox_deliveries WHERE provider = 'b' AND project_id = 'q'")
    assert [purge_waiting(connection, "a") for _ in range(2)] == [4, None]
    assert query("SELECT provider, project_id FROM outbox_deliveries") == [("b", "p")]
    assert query("SELECT project_id FROM outbox_payloads") == [("p",)]
    assert query(ORPHANS) == [(0, 0)]


def test_a_provider_without_a_forwarder_is_found(
    save: Save, query: Query, connection: Connection
) -> None:
    """Found is what is not enabled here, waits or has a trouble, and was not seen lately."""
    save_groups(save, ("p", 1))
    assert [*find_abandoned(connection, ["b"], 60)] == ["a"]
    connection.commit()
    show_lane(connection, "a", LaneState("stopped"))
    assert [*find_abandoned(connection, ["b"], 60)] == []
    query("UPDATE forward_lanes SET seen_at = now() - '2 min'::interval")
    assert [*find_abandoned(connection, ["b"], 60)] == ["a"]
    query("DELETE FROM outbox_deliveries WHERE provider = 'a'")
    assert [*find_abandoned(connection, ["b"], 60)] == ["a"]
    assert [*find_abandoned(connection, ["a", "b"], 60)] == []


def test_a_retried_event_keeps_its_arrival_but_not_its_age(
    save: Save, query: Query, connection: Connection
) -> None:
    """A retried event was received when it first was, but is given up only after the retry."""
    save(make_rows("p", 1))
    query("UPDATE outbox_payloads SET received_at = '2024-01-15T10:30Z'")
    lease, [delivery] = claim(connection, "a")
    record_outcomes(connection, "a", lease, [Outcome(delivery, dead={0: Death("no", "")})])
    with connection.begin():
        assert retry_dead(connection, "a", []) == 1
    cut = datetime(2024, 1, 16, tzinfo=UTC)
    limits = ClaimLimits(1000, 1 << 20)
    assert bury_expired(connection, "a", limits, cut, Death("given up", "")) == 0
    _, [again] = claim(connection, "a")
    assert again.project_id == "p"
    assert again.received_at == delivery.received_at
    assert again.queued_at > cut
