"""A person's rows of the events table, found without an index: a part of all pages at a time.

Users have no index, since every insert would pay for it. Each part is a short transaction, so
that ingestion and vacuum go on. A row stays where it is, so that none is missed: what is stored
meanwhile is in the last part, or arrived after the search began.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from server.events.persons import ANONYMOUS_ID, EventIds, Person
from server.storage.citus import is_distributed, measure_pages
from server.storage.event_queries import COLUMNS, StoredEvent, make_event

# As much of each partition as one transaction reads: 16 MB.
_PAGES = 2048

_MEASURE = text("""
SELECT max(pg_relation_size(inhrelid)) / current_setting('block_size')::bigint FROM pg_inherits
 WHERE inhparent = 'events'::regclass
""")
_IS_OWNED = f"""
project_id = :project AND (user_id = CAST(:user AS text)
    OR attributes ->> '{ANONYMOUS_ID}' = ANY(CAST(:anonymous AS text[])))
"""
_IS_OWNED_BY_USER = "project_id = :project AND user_id = CAST(:user AS text)"
# In all partitions at once: rows can be deleted through the whole table alone.
_IN_PART = """
ctid >= format('(%s,0)', CAST(:start AS bigint))::tid
   AND (CAST(:is_last AS boolean) OR ctid < format('(%s,0)', CAST(:end AS bigint))::tid)
"""
_ARRIVED = "received_at >= :since"
_READ = f"SELECT {COLUMNS}, tableoid::regclass::text AS partition FROM events WHERE "  # noqa: S608 - the columns are the schema's
_READ_IDS = text(f"""
SELECT DISTINCT user_id, attributes ->> '{ANONYMOUS_ID}' FROM events WHERE project_id = :project
""")  # noqa: S608 - a constant
_IDS_AT_ONCE = 10_000
_ORDER = " ORDER BY event_timestamp, event_id"
_DELETE = "DELETE FROM events WHERE "


class Part(NamedTuple):
    """Pages of every partition, from `start` up to `end`, or to the last one of all."""

    start: int
    end: int
    is_last: bool


def list_parts(connection: Connection) -> Iterator[Part]:
    """Yield the parts in which all events are that are stored now."""
    with connection.begin():
        if is_distributed(connection):
            pages = measure_pages(connection)
        else:
            pages = int(connection.scalar(_MEASURE) or 0)
    for start in range(0, pages + 1, _PAGES):
        yield Part(start, start + _PAGES, is_last=start + _PAGES > pages)


def read_events(connection: Connection, person: Person, part: Part) -> list[StoredEvent]:
    """Return a person's events in one part."""
    with connection.begin():
        statement, values = _compose(_READ, person, part)
        rows = connection.execute(text(statement + _ORDER), values).mappings()
        return [make_event(row) for row in rows]


def read_all_ids(connection: Connection, project_id: str) -> Iterator[EventIds]:
    """Yield the different ids of a project's events, in one transaction."""
    with connection.begin():
        streamed = {"yield_per": _IDS_AT_ONCE}
        wanted = {"project": project_id}
        for user, anonymous in connection.execute(_READ_IDS, wanted, execution_options=streamed):
            yield EventIds(user or "", anonymous or "")


def delete_events(connection: Connection, person: Person, part: Part) -> int:
    """Delete a person's events in one part, in the connection's transaction; return how many."""
    statement, values = _compose(_DELETE, person, part)
    return connection.execute(text(statement), values).rowcount


def delete_arrived_events(connection: Connection, person: Person, since: datetime) -> int:
    """Delete a person's events that arrived since a time, as `delete_events` does.

    The index on their arrival finds them.
    """
    statement, values = _compose(_DELETE, person, None)
    statement = f"{statement} AND {_ARRIVED}"
    return connection.execute(text(statement), values | {"since": since}).rowcount


def _compose(statement: str, person: Person, part: Part | None) -> tuple[str, dict[str, object]]:
    """Return a statement on a person's rows, and its values."""
    owned = _IS_OWNED if person.anonymous_ids else _IS_OWNED_BY_USER
    values: dict[str, object] = {
        "project": person.project_id,
        "user": person.user_id,
        "anonymous": list(person.anonymous_ids),
    }
    if part is None:
        return statement + owned, values
    return f"{statement}{owned} AND {_IN_PART}", values | part._asdict()
