"""Groups of rows are stored whole, once, unchanged and durably."""

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import Unavailable
from server.events.copy_rows import Row
from server.storage.connection import Connection, Engine, connected, open_engine
from server.storage.errors import Conflict, Refused
from server.storage.events import EventStore
from tests.support.events import ENCODER, make_row

# Makes the database tell how each row was written, and acknowledge before its disk has it.
OBSERVE = """
CREATE FUNCTION observe() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.page_title := current_query();
    NEW.page_path := current_setting('synchronous_commit');
    RETURN NEW;
END $$;
CREATE TRIGGER observe BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION observe();
DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database());
END $$;
"""
ODD_TEXTS = [
    *("", " ", "\\", "\\\\", "\t", "\n", "\r", "\r\n", "\\.", "\n\\.\n", "\\N", "\\n", "\\x41"),
    *("'", '"', "''", '\\"', "$$", "%s", "{}", ";--", "\b\f\v", "\x01\x1f\x7f", "\x85\u2028"),
    *("😀", "👩\u200d👧", "e\u0301", "\ufffd", "\ufeff", "\uffff", "\U0010ffff", "漢字", "א\u202e"),
    *("null", "NULL", "true", "0", "a" * 10_000),
]

Query = Callable[..., list[Any]]
Name = Callable[[], str]


@pytest.fixture(scope="module")
def reader(url: str) -> Iterator[psycopg2.extensions.connection]:
    """Provide a connection beside the service's."""
    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        yield connection


@pytest.fixture(scope="module")
def query(reader: psycopg2.extensions.connection) -> Query:
    """Run a query beside the service and return its rows."""

    def run(statement: str, *parameters: Any) -> list[Any]:
        with reader.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall()

    return run


@pytest.fixture(scope="module")
def new_project() -> Name:
    """Make names that no test has used."""
    numbers = iter(range(1_000_000))
    return lambda: f"project {next(numbers)}"


@pytest.fixture
def store() -> EventStore:
    """Return a store that has seen no duplicates."""
    return EventStore(ENCODER.columns)


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    """Provide a connection such as the service's."""
    with connected(engine) as connection:
        yield connection


def test_duplicates_are_counted_by_their_commit(connection: Connection) -> None:
    """What was given twice, or had been stored, is counted by the commit that leaves it out."""
    counts: list[int] = []
    store = EventStore(ENCODER.columns, on_duplicates=lambda of: counts.append(of["duplicates"]))
    rows = [make_row("duplicates", f"event {number}") for number in range(4)]
    store.save(connection, rows[:2], 5)
    assert counts == []
    store.save(connection, [rows[2], rows[2], rows[2]], 5)
    assert counts == [2]
    store.save(connection, rows, 5)  # the first that meets some, which COPY alone refuses
    assert counts == [2, 3]
    store.save(connection, [*rows, *rows], 5)
    assert counts == [2, 3, 8]


@pytest.mark.parametrize("queues", [False, True])
def test_duplicates_are_counted_by_their_projects(
    connection: Connection, new_project: Name, queues: bool
) -> None:
    """Each project has its own duplicates, whether stored events are also queued or not."""
    first, second, third = new_project(), new_project(), new_project()
    counts: list[Mapping[str, int]] = []
    also_store = (lambda *_: b"") if queues else None
    store = EventStore(ENCODER.columns, also_store, on_duplicates=counts.append)
    old, new = ([make_row(project, kind) for project in (first, second)] for kind in ("old", "new"))
    store.save(connection, [*old, make_row(third, "once")], 5)
    store.save(connection, [*old, *new, new[1]], 5)
    store.save(connection, [make_row(third, "twice")] * 2, 5)
    assert counts == [{first: 1, second: 2}, {third: 1}]


TEXTS = "SELECT event_name, ui_state_after, metadata->>'value', attributes FROM events"


def store_texts(texts: Sequence[str], save: Callable[[list[Row]], None], query: Query) -> None:
    """Store one event for each text, with it in several columns, and compare what is there."""
    places = [{"value": text, text: [text]} for text in texts]
    save(
        [
            make_row(
                "texts",
                f"{text}!",
                event_name=text,
                ui_state_after=text,
                metadata={"value": text},
                attributes={"object": place},
            )
            for text, place in zip(texts, places, strict=True)
        ]
    )
    for text, place in zip(texts, places, strict=True):
        [row] = query(f"{TEXTS} WHERE project_id = 'texts' AND event_id = %s", f"{text}!")
        assert row == (text, text, text, {"object": place})


def test_odd_characters_survive_in_every_column(
    store: EventStore, connection: Connection, query: Query
) -> None:
    """Every odd character survives unchanged, in text and in jsonb columns."""
    store_texts(ODD_TEXTS, lambda rows: store.save(connection, rows, 5), query)


@given(texts=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
@settings(max_examples=50, deadline=None)
def test_any_storable_text_survives_unchanged(
    texts: list[str], engine: Engine, query: Query
) -> None:
    """Any text that PostgreSQL can hold survives unchanged, sent again or not."""
    with connected(engine) as connection:
        store = EventStore(ENCODER.columns)
        store_texts(texts, lambda rows: store.save(connection, rows, 5), query)


def test_the_staging_table_changes_no_text(
    store: EventStore, connection: Connection, query: Query
) -> None:
    """The path through the staging table changes nothing either."""
    store.save(connection, [make_row("texts", "first")], 5)
    store.save(connection, [make_row("texts", "first")], 5)
    store_texts(
        [f"staged {text}" for text in ODD_TEXTS], lambda r: store.save(connection, r, 5), query
    )


def test_empty_and_zero_are_stored_as_present(
    store: EventStore, connection: Connection, query: Query
) -> None:
    """Empty texts and zeros are told from absent ones."""
    store.save(
        connection,
        [
            make_row("nulls", "absent"),
            make_row("nulls", "empty", user_id="", duration_ms=0, api_status_code=0, metadata={}),
        ],
        5,
    )
    assert query(
        "SELECT event_id, user_id, duration_ms, api_status_code, metadata FROM events"
        " WHERE project_id = 'nulls' ORDER BY 1"
    ) == [("absent", None, None, None, None), ("empty", "", 0, 0, {})]


@pytest.mark.parametrize("seconds", [-62_135_596_800, -1, 0, 253_402_300_799])
def test_timestamps_are_stored_to_the_microsecond(
    seconds: int, store: EventStore, connection: Connection, query: Query, new_project: Name
) -> None:
    """Instants from the year 1 to the year 9999 are stored to the microsecond."""
    project = new_project()
    store.save(connection, [make_row(project, "e", seconds=seconds, nanos=999_999_000)], 5)
    microseconds = "(extract(epoch FROM event_timestamp) * 1000000)::bigint"
    assert query(f"SELECT {microseconds} FROM events WHERE project_id = %s", project) == [
        (seconds * 1_000_000 + 999_999,)
    ]


STORED = "SELECT event_id, event_name FROM events WHERE project_id = %s ORDER BY event_id"


def test_the_first_of_equal_events_is_stored(
    store: EventStore, connection: Connection, query: Query, new_project: Name
) -> None:
    """Of equal events the first is stored, within a group and across groups."""
    project = new_project()
    groups = [["a1", "a2", "b1", "a3"], ["b2", "c1", "c2"], ["a4", "b3", "c3"], ["d1", "d2"]]
    for group in groups:
        rows = [make_row(project, name[0], event_name=name) for name in group]
        store.save(connection, rows, 5)
    assert query(STORED, project) == [("a", "a1"), ("b", "b1"), ("c", "c1"), ("d", "d1")]


def test_events_differing_in_key_are_different(
    store: EventStore, connection: Connection, query: Query, new_project: Name
) -> None:
    """Events that differ in project, id or microsecond are different events."""
    one, other = new_project(), new_project()
    rows = [
        *(make_row(one, "e"), make_row(other, "e"), make_row(one, "f"), make_row(one, "E")),
        *(make_row(one, "e", nanos=1000), make_row(one, "e ", event_name="blank")),
    ]
    for _ in range(2):
        store.save(connection, rows, 5)
    assert query("SELECT count(*) FROM events WHERE project_id IN (%s, %s)", one, other) == [(6,)]


def test_duplicates_switch_to_staging_for_five_seconds(create_migrated: Callable[[], str]) -> None:
    """After a duplicate rows are staged for five seconds; they are synced to disk on both paths."""
    url = create_migrated()
    with closing(psycopg2.connect(url)) as observer, observer, observer.cursor() as cursor:
        cursor.execute(OBSERVE)
    now = [100.0]
    store = EventStore(ENCODER.columns, clock=lambda: now[0])
    engine = open_engine(url)
    with connected(engine) as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "off"
        connection.commit()
        for seconds, names in [(0, "a"), (0, "b"), (0, "bc"), (0, "d"), (4.9, "e"), (0.2, "f")]:
            now[0] += seconds
            store.save(connection, [make_row("p", name) for name in names], 5)
        written = connection.exec_driver_sql(
            "SELECT event_id, page_title ~ 'COPY events ', page_path FROM events ORDER BY 1"
        )
        straight = {"a": True, "b": True, "c": False, "d": False, "e": False, "f": True}
        assert written.fetchall() == [(name, straight[name], "on") for name in "abcdef"]


def test_a_group_with_another_row_count_fails(
    engine: Engine, store: EventStore, query: Query, new_project: Name
) -> None:
    """A group of which PostgreSQL takes another number of rows is not stored at all."""
    project = new_project()
    two = Row(("", 0, ""), make_row(project, "one").text + make_row(project, "more").text)
    with connected(engine) as connection, pytest.raises(RuntimeError, match="3 of 2 rows"):
        store.save(connection, [two, make_row(project, "lost")], 5)
    assert query(STORED, project) == []


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Nobody else can write events meanwhile."""
    with closing(psycopg2.connect(url)) as holder, holder.cursor() as cursor:
        cursor.execute("LOCK TABLE events IN SHARE MODE")
        yield


SETTINGS = "SELECT name, setting FROM pg_settings WHERE context IN ('user', 'superuser') ORDER BY 1"


@pytest.mark.parametrize("outcome", ["stored", "sent again", Refused, Conflict, Unavailable])
def test_a_group_is_stored_whole_or_not_at_all(
    outcome: Any, url: str, engine: Engine, store: EventStore, query: Query, new_project: Name
) -> None:
    """Whatever becomes of a group, it is whole or absent, and the session's settings stay."""
    project = new_project()
    rows = [make_row(project, name) for name in "abc"]
    with connected(engine) as connection:
        before = connection.exec_driver_sql(SETTINGS).fetchall()
        connection.commit()
        if outcome is Refused:
            rows[1] = Row(rows[1].identity, rows[1].text.replace("session", ""))
            with pytest.raises(Refused):
                store.save(connection, rows, 5)
        elif outcome in (Conflict, Unavailable):
            # Of the two limits, the one that is to be met is far below the other.
            limits = (60, 0.05) if outcome is Conflict else (0.2, 60)
            with locked(url), pytest.raises(outcome):
                store.save(connection, rows, *limits)
        else:
            for _ in range(1 if outcome == "stored" else 2):
                store.save(connection, rows, 5)
        if outcome is not Unavailable:
            assert connection.exec_driver_sql(SETTINGS).fetchall() == before
    stored = [(name, None) for name in "abc"] if isinstance(outcome, str) else []
    assert query(STORED, project) == stored


def test_concurrent_duplicates_are_stored_once(
    engine: Engine, query: Query, new_project: Name
) -> None:
    """Events that eight writers store at the same moment, in any order, are there once."""
    start = threading.Barrier(8)

    def save_shuffled(rows: list[Row], seed: int) -> None:
        store, shuffled = EventStore(ENCODER.columns), random.Random(seed).sample(rows, len(rows))
        with connected(engine) as connection:
            start.wait(60)
            while True:
                with suppress(Conflict):
                    return store.save(connection, shuffled, 60)

    for _ in range(10):
        project = new_project()
        rows = [make_row(project, f"e{number}") for number in range(500)]
        with ThreadPoolExecutor(8) as threads:
            for saved in [threads.submit(save_shuffled, rows, seed) for seed in range(8)]:
                saved.result(120)
        assert query("SELECT count(*) FROM events WHERE project_id = %s", project) == [(500,)]
