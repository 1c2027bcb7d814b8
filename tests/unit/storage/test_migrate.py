"""A database is brought to what this version needs, or refused with advice."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from server.events.schema import EVENT_SCHEMA
from server.storage.connection import Engine, connected, open_engine
from server.storage.errors import DatabaseError
from server.storage.migrate import UnsuitableDatabase, check_migrated, migrate
from tests.support.services import query

COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod), attnotnull
  FROM pg_attribute WHERE attrelid = 'events'::regclass AND attnum > 0 AND NOT attisdropped
"""
TABLES = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY relname"


@pytest.fixture
def engine(create_database: Callable[[], str]) -> Engine:
    """How the service connects to an empty database."""
    return open_engine(create_database())


def test_the_events_table_has_every_schema_field(engine: Engine) -> None:
    """The migrated table has a column for each field of the schema, and the time of arrival."""
    migrate(engine)
    fields = {(field.name, field.kind.value, field.rules.required) for field in EVENT_SCHEMA.fields}
    received_at = ("received_at", "timestamp with time zone", True)
    assert set(query(engine, COLUMNS)) == fields | {received_at}


def test_the_primary_key_compares_texts_by_bytes(engine: Engine) -> None:
    """An event is one by project, time and id, and texts are compared byte by byte."""
    migrate(engine)
    key = "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'events'::regclass"
    key += " AND indisprimary"
    [[definition]] = query(engine, key)
    assert str(definition).endswith("(project_id, event_timestamp, event_id)")
    collations = "SELECT DISTINCT attcollation::regcollation::text FROM pg_attribute"
    texts = "WHERE attrelid = 'events'::regclass AND atttypid = 'text'::regtype"
    assert query(engine, f"{collations} {texts}") == [('"C"',)]


def test_migrating_twice_changes_nothing(engine: Engine) -> None:
    """Migrating again changes nothing."""
    migrate(engine)
    before = query(engine, TABLES)
    migrate(engine)
    check_migrated(engine)
    assert query(engine, TABLES) == before


def test_four_migrations_at_once_are_one(engine: Engine) -> None:
    """Four migrations at the same moment are one."""
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(migrate, [engine] * 4)) == [None] * 4
    check_migrated(engine)


def test_a_newer_database_is_accepted_and_left_alone(engine: Engine) -> None:
    """A database that a newer version has migrated is accepted, and left alone."""
    migrate(engine)
    with connected(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    migrate(engine)
    check_migrated(engine)
    assert query(engine, "SELECT version_num FROM alembic_version") == [("9999",)]


@pytest.mark.parametrize(
    ("state", "found"),
    [("", "empty"), ("CREATE TABLE strange ()", "empty"), ("0000", "at revision 0000")],
)
def test_an_older_database_is_refused_with_advice(state: str, found: str, engine: Engine) -> None:
    """An older database is refused with what was found, what is needed and what to do."""
    with connected(engine) as connection:
        if state == "0000":
            migrate(engine)
            connection.execute(text("UPDATE alembic_version SET version_num = '0000'"))
        elif state:
            connection.execute(text(state))
    advice = rf"^the database is {found}, revision \d{{4}} is needed: run 'productgraph migrate'$"
    with pytest.raises(DatabaseError, match=advice):
        check_migrated(engine)


def test_a_failed_migration_leaves_nothing_behind(engine: Engine) -> None:
    """A migration that fails leaves nothing behind, and works once its obstacle is gone."""
    with connected(engine) as connection:
        connection.execute(text("CREATE TABLE api_keys (obstacle int)"))
        connection.commit()
        with pytest.raises(DatabaseError, match='relation "api_keys" already exists'):
            migrate(engine)
        assert query(engine, TABLES) == [("api_keys",)]
        connection.execute(text("DROP TABLE api_keys"))
        connection.commit()
    migrate(engine)
    check_migrated(engine)


@pytest.mark.parametrize("use", [migrate, check_migrated])
def test_a_database_without_utf_8_is_refused(
    use: Callable[[Engine], None], create_database: Callable[..., str]
) -> None:
    """A database that cannot hold every text is refused before anything is made in it."""
    url = create_database("ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'")
    engine = open_engine(url)
    with pytest.raises(UnsuitableDatabase, match="encoding is SQL_ASCII, UTF8 is needed"):
        use(engine)
    assert query(engine, TABLES) == []
