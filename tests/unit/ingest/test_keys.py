"""API keys are recognised without the database, kept as digests, and known quickly and briefly."""

import hashlib
import logging
import string
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from server.caller import Caller
from server.errors import Unauthenticated, Unavailable
from server.ingest import key_cache as key_directory
from server.ingest.key_cache import KeyCache
from server.storage.connection import Engine, GuardedConnection, connected, open_engine
from server.storage.health import Watchdog
from server.storage.keys import (
    ApiKey,
    KeyReplaced,
    count_ending,
    create_key,
    find_key,
    find_successor,
    generate_key,
    is_well_formed,
    limit_key,
    list_keys,
    list_uses,
    replace_key,
    revoke_key,
)
from tests.support.clock import Clock
from tests.support.database import noted_statements
from tests.support.services import wait_until

# The service promises to refuse a revoked key after so long.
REVOCATION_SECONDS = 30
REFRESH_SECONDS = 10


@pytest.fixture
def queries(engine: Engine) -> Iterator[list[str]]:
    """Provide the statements about keys that ran during a test."""
    with noted_statements(engine, "api_keys") as seen:
        yield seen


@pytest.fixture
def clock() -> Clock:
    """Return the clock of the directory under test."""
    return Clock()


@pytest.fixture
def directory(engine: Engine, clock: Clock) -> Iterator[KeyCache]:
    """Provide a running directory."""
    with KeyCache(GuardedConnection(engine), clock) as directory:
        yield directory


def add_key(engine: Engine, project: str = "proj") -> str:
    """Return a new key."""
    with connected(engine) as connection:
        return create_key(connection, project, "test")


def revoke(engine: Engine) -> None:
    """Revokes the newest key."""
    with connected(engine) as connection:
        assert revoke_key(connection, list_keys(connection)[-1].id)


def refresh(directory: KeyCache) -> None:
    """Make the directory do whatever it is time for: it does so after a look-up."""
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            directory.look_up(generate_key()).result(60)


def known_project(directory: KeyCache, key: str) -> str | None:
    """Return the project of a key, if the directory knows it."""
    caller = directory.known_caller(key)
    return caller and caller.project_id


def test_generated_keys_are_recognisable_and_different() -> None:
    """Keys are recognisable, all different, and well-formed."""
    keys = {generate_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(key.startswith("pgk_") and len(key) == 44 and is_well_formed(key) for key in keys)


def test_a_key_with_any_typo_is_malformed() -> None:
    """A key with any one character changed, lost, doubled or swapped is malformed."""
    key = generate_key()
    alphabet = string.ascii_letters + string.digits + "_=-\0\n\u0131\uff12"
    for place, character in enumerate(key):
        head, tail = key[:place], key[place + 1 :]
        changed = {head + other + tail for other in alphabet}
        changed |= {head + tail, head + character * 2 + tail}
        if tail:
            changed.add(head + tail[0] + character + tail[1:])
        assert not [other for other in changed - {key} if is_well_formed(other)]


@given(st.text() | st.from_regex(r"pgk_[a-z2-7]{40}", fullmatch=True))
def test_no_guess_is_a_well_formed_key(guess: str) -> None:
    """Neither any text nor a guess of the right shape is well-formed, and none is an error."""
    assert not is_well_formed(guess)


def test_a_key_is_created_listed_and_revoked_once(engine: Engine) -> None:
    """A key can be created, listed and revoked, once; others of its project stay."""

    def find(project: str) -> list[ApiKey]:
        return [key for key in list_keys(connection) if key.project_id == project]

    with connected(engine) as connection:
        for name in ("old", "new"):
            create_key(connection, "rotating", name)
        old, new = find("rotating")
        assert (old.name, new.name, old.last_used_at, old.revoked_at) == ("old", "new", None, None)
        assert revoke_key(connection, old.id)
        assert not revoke_key(connection, old.id)
        assert not revoke_key(connection, 0)
        revoked, kept = find("rotating")
        assert revoked.revoked_at is not None
        assert revoked.revoked_at >= revoked.created_at
        assert kept == new


def test_the_key_table_has_digests_only(engine: Engine) -> None:
    """Who reads the table learns the digest of a key, and nothing of the key itself."""
    key = add_key(engine)
    with connected(engine) as connection:
        row = str(connection.execute(text("SELECT k::text FROM api_keys k ORDER BY id")).all()[-1])
    assert hashlib.sha256(key.encode()).hexdigest() in row
    secret = key.removeprefix("pgk_")
    assert not [part for part in (secret, secret[:12], secret.encode().hex()) if part in row]


def test_a_new_key_is_found_by_one_query(
    engine: Engine, directory: KeyCache, queries: list[str]
) -> None:
    """A new key is found at once, by one query, and then known without any."""
    key = add_key(engine, "mine")
    queries.clear()
    assert directory.known_caller(key) is None
    assert directory.look_up(key).result(60).project_id == "mine"
    assert [known_project(directory, key) for _ in range(100)] == ["mine"] * 100
    assert len(queries) == 1


def test_simultaneous_look_ups_share_one_query(engine: Engine, queries: list[str]) -> None:
    """Many look-ups of several keys at the same time make one query."""
    known, unknown = add_key(engine, "busy"), generate_key()
    queries.clear()
    directory = KeyCache(GuardedConnection(engine))
    futures = [directory.look_up(key) for key in (known, unknown) * 100]
    with directory:
        assert {future.result(60).project_id for future in futures[::2]} == {"busy"}
        assert {type(future.exception(60)) for future in futures[1::2]} == {Unauthenticated}
        assert len(queries) == 1


@pytest.mark.parametrize("key", ["", "x", "pgk_", "pgk_" + "a" * 40, "é\0", "a" * 10_000])
def test_a_malformed_key_needs_no_database(key: str) -> None:
    """A malformed key is refused without a database."""
    directory = KeyCache(GuardedConnection(open_engine("postgresql://nowhere/none")))
    with pytest.raises(Unauthenticated, match="missing or invalid API key"):
        directory.known_caller(key)


def test_an_unknown_key_is_queried_every_thirty_seconds(
    directory: KeyCache, clock: Clock, queries: list[str]
) -> None:
    """An unknown key is asked for once in thirty seconds."""
    key = generate_key()
    assert isinstance(directory.look_up(key).exception(60), Unauthenticated)
    for seconds in (0, 29):
        clock.now += seconds
        with pytest.raises(Unauthenticated):
            directory.known_caller(key)
    clock.now += 1
    assert directory.known_caller(key) is None
    assert len(queries) == 1


def test_the_memory_of_unknown_keys_is_bounded(
    directory: KeyCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of very many unknown keys the first are forgotten, and only these."""
    monkeypatch.setattr(key_directory, "_MAX_UNKNOWN", 10)
    keys = [generate_key() for _ in range(15)]
    for key in keys:
        directory.look_up(key).exception(60)
    assert [directory.known_caller(key) for key in keys[:5]] == [None] * 5
    for key in keys[5:]:
        with pytest.raises(Unauthenticated):
            directory.known_caller(key)


def test_too_many_pending_look_ups_are_refused(engine: Engine) -> None:
    """Too many keys to look up at a time are refused at once."""
    directory = KeyCache(GuardedConnection(engine))
    for _ in range(1000):
        directory.look_up(generate_key())
    with pytest.raises(Unavailable, match="too many API keys"):
        directory.look_up(generate_key())


def test_a_revoked_key_is_refused_after_a_refresh(
    engine: Engine, directory: KeyCache, clock: Clock
) -> None:
    """A revoked key is refused after the next refresh, and its neighbour is not."""
    neighbour, key = add_key(engine, "neighbour"), add_key(engine, "mine")
    for each in (neighbour, key):
        directory.look_up(each).result(60)
    revoke(engine)
    clock.now += REFRESH_SECONDS
    refresh(directory)
    assert known_project(directory, neighbour) == "neighbour"
    assert directory.known_caller(key) is None
    with pytest.raises(Unauthenticated):
        directory.look_up(key).result(60)
    with pytest.raises(Unauthenticated):
        directory.known_caller(key)


@pytest.mark.parametrize("column", ["expires_at", "retires_at"])
def test_a_key_is_refused_after_its_end(
    column: str, engine: Engine, directory: KeyCache, clock: Clock
) -> None:
    """A key that ends is refused after the next refresh, and its neighbour is not."""
    neighbour, key = add_key(engine, "neighbour"), add_key(engine, "mine")
    set_newest(engine, f"{column} = now() + interval '1 h'")
    for each in (neighbour, key):
        directory.look_up(each).result(60)
    set_newest(engine, f"{column} = now()")
    clock.now += REFRESH_SECONDS
    refresh(directory)
    assert known_project(directory, neighbour) == "neighbour"
    with pytest.raises(Unauthenticated):
        directory.look_up(key).result(60)


def set_newest(engine: Engine, change: str) -> None:
    """Change the row of the newest key."""
    newest = "(SELECT max(id) FROM api_keys)"
    with connected(engine) as connection:
        connection.execute(text(f"UPDATE api_keys SET {change} WHERE id = {newest}"))


def test_a_replaced_key_is_followed_by_its_like(engine: Engine) -> None:
    """The next key has the old one's terms and lifetime; a valid one is not replaced twice."""
    with connected(engine) as connection:
        create_key(connection, "next", "web", 5, 2048, lifetime=timedelta(days=90))
        old = list_keys(connection)[-1]
        grace = timedelta(days=2)
        assert replace_key(connection, old.id, grace)
        new, replaced = list_keys(connection)[-1], find_key(connection, old.id)
        assert replaced is not None
        assert replaced.retires_at == old.created_at + grace == replaced.ends_at
        terms = ("project_id", "name", "event_rate", "byte_rate", "expires_at", "origins")
        assert [getattr(new, name) for name in terms] == [getattr(old, name) for name in terms]
        assert (new.replaces, find_successor(connection, old.id)) == (old.id, new.id)
        with pytest.raises(KeyReplaced, match=f"replaced by key {new.id}"):
            replace_key(connection, old.id, grace)
        assert revoke_key(connection, new.id)
        assert replace_key(connection, old.id, grace, timedelta(days=1))
        assert list_keys(connection)[-1].expires_at == old.created_at + timedelta(days=1)
        assert replace_key(connection, new.id, grace) is None


@pytest.mark.parametrize(
    ("change", "is_ending"),
    [
        ("expires_at = now() + interval '6 d', last_used_at = now()", True),
        ("expires_at = now() + interval '8 d', last_used_at = now()", False),
        ("retires_at = now() + interval '23 h', last_used_at = now()", True),
        ("retires_at = now() + interval '6 d', last_used_at = now()", False),
        ("expires_at = now() + interval '6 d', last_used_at = now() - interval '3 d'", False),
        ("expires_at = now() + interval '6 d'", False),
        ("expires_at = now() - interval '1 h', last_used_at = now()", False),
        ("expires_at = now() + interval '6 d', last_used_at = now(), revoked_at = now()", False),
    ],
)
def test_only_keys_in_use_are_announced_to_end(
    change: str, is_ending: bool, engine: Engine
) -> None:
    """A key is announced a week before it ends, a replaced one a day, if it is valid and used."""
    with connected(engine) as connection:
        before = count_ending(connection)
    add_key(engine)
    set_newest(engine, change)
    with connected(engine) as connection:
        assert count_ending(connection) - before == is_ending
        assert list_keys(connection)[-1].is_ending(datetime.now(UTC)) == is_ending
    set_newest(engine, "revoked_at = now()")


def test_new_rates_apply_after_a_refresh(engine: Engine, directory: KeyCache, clock: Clock) -> None:
    """A key's rates are known with it, and new ones after the next refresh."""
    with connected(engine) as connection:
        key = create_key(connection, "mine", "test", event_rate=5)
        connection.commit()
        number = list_keys(connection)[-1].id
        assert directory.look_up(key).result(60) == Caller("mine", number, 5, None)
        assert limit_key(connection, number, byte_rate=2048)
        assert not limit_key(connection, 0, byte_rate=2048)
    clock.now += REFRESH_SECONDS
    refresh(directory)
    assert directory.known_caller(key) == Caller("mine", number, 5, 2048)


def test_an_outage_limits_the_trust_in_keys(engine: Engine, clock: Clock) -> None:
    """While the database is away, a key is trusted for less time than revocation may take."""
    key = add_key(engine)
    with KeyCache(GuardedConnection(engine), clock) as directory:
        directory.look_up(key).result(60)
        assert known_project(directory, key) == "proj"
    clock.now += REFRESH_SECONDS + 1
    assert known_project(directory, key) == "proj"
    clock.now = 1000 + REVOCATION_SECONDS - 5
    assert directory.known_caller(key) is None
    with pytest.raises(Unavailable):
        directory.look_up(key)


def test_the_last_use_of_a_key_is_recorded(
    engine: Engine, directory: KeyCache, clock: Clock
) -> None:
    """The last use of a key is on record a minute later, and that of an idle one is not."""
    idle, used = add_key(engine), add_key(engine)
    for key in (idle, used):
        directory.look_up(key).result(60)
    for _ in range(7):
        directory.known_caller(used)
        clock.now += REFRESH_SECONDS
        refresh(directory)
    with connected(engine) as connection:
        records = [key.last_used_at for key in list_keys(connection)[-2:]]
    assert [record is not None for record in records] == [False, True]
    assert [known_project(directory, key) for key in (idle, used)] == [None, "proj"]


def test_the_last_use_of_each_day_is_kept(
    engine: Engine, directory: KeyCache, clock: Clock
) -> None:
    """The last use of a key on each day is kept for 90 days; a later use takes its place."""
    directory.look_up(key := add_key(engine)).result(60)
    with connected(engine) as connection:
        number = list_keys(connection)[-1].id
        connection.execute(
            text(
                "INSERT INTO api_key_uses SELECT :id, CAST(now() AT TIME ZONE 'UTC' AS date) - age,"
                " now() - age * interval '1 d' FROM unnest(ARRAY[0, 1, 91]) AS age"
            ),
            {"id": number},
        )
        earlier = list_uses(connection, number)
    for _ in range(7):
        directory.known_caller(key)
        clock.now += REFRESH_SECONDS
        refresh(directory)
    with connected(engine) as connection:
        kept = list_uses(connection, number)
    assert [use for use in kept if use.day == earlier[1].day] == [earlier[1]]
    assert kept[0].last_used_at > earlier[0].last_used_at
    assert earlier[2].day not in [use.day for use in kept]


def test_look_ups_fail_at_once_during_an_outage() -> None:
    """While the database is away the first look-up fails in time, the next ones at once."""
    directory = KeyCache(GuardedConnection(open_engine("postgresql://me@127.0.0.1:1/db")))
    with directory:
        assert isinstance(directory.look_up(generate_key()).exception(60), Unavailable)
        with pytest.raises(Unavailable):
            directory.look_up(generate_key())


def test_a_hanging_look_up_is_cut_and_replaced(engine: Engine) -> None:
    """A query that hangs is answered for and cut, and the next one works."""
    link, key = GuardedConnection(engine), add_key(engine)
    directory = KeyCache(link)
    with Watchdog(directory.check), directory:
        with connected(engine) as holder:
            holder.execute(text("LOCK TABLE api_keys"))
            assert isinstance(directory.look_up(key).exception(60), Unavailable)
        wait_until(lambda: finds(directory, key))


def finds(directory: KeyCache, key: str) -> bool:
    """Whether a look-up of this key is answered."""
    try:
        return bool(directory.look_up(key).result(60))
    except Unavailable:
        return False


def test_a_look_up_ending_at_its_cut_keeps_working(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query that ends in the very moment of its cut does not end look-ups for good."""
    link, key = GuardedConnection(engine), add_key(engine)
    with KeyCache(link) as directory:
        directory.look_up(key).result(60)
        with monkeypatch.context() as patch:
            patch.setattr(link, "cut_if_overdue", lambda: True)
            directory.check()
        wait_until(lambda: finds(directory, key))


def test_a_failing_refresh_waits_and_heals(
    engine: Engine, directory: KeyCache, clock: Clock, queries: list[str]
) -> None:
    """A refresh that fails for good is not tried again in a busy loop, and heals."""
    key = add_key(engine)
    directory.look_up(key).result(60)
    with connected(engine) as connection:
        connection.execute(text("ALTER TABLE api_keys RENAME TO hidden"))
        connection.commit()
        queries.clear()
        clock.now += REFRESH_SECONDS
        directory.look_up(generate_key()).exception(60)
        time.sleep(0.3)  # long enough for hundreds of turns
        turns = len(queries)
        connection.execute(text("ALTER TABLE hidden RENAME TO api_keys"))
    assert turns < 10
    wait_until(lambda: finds(directory, key))


def test_no_key_is_ever_logged(url: str, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """No key is ever logged, at any level, whatever becomes of it."""
    for logger in (None, "sqlalchemy"):
        caplog.set_level(logging.DEBUG, logger)
    verbose = open_engine(url)
    keys = [add_key(verbose), generate_key(), generate_key()]
    with KeyCache(GuardedConnection(verbose), clock) as directory:
        for key in keys[:2]:
            directory.look_up(key).exception(60)
    away = KeyCache(GuardedConnection(open_engine("postgresql://me@127.0.0.1:1/db")))
    with away:
        away.look_up(keys[2]).exception(60)
    assert "api_keys" in caplog.text
    assert "cannot be looked up" in caplog.text
    assert not [key for key in keys if key.removeprefix("pgk_") in caplog.text]
