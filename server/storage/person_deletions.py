"""The table of receipts of deletions, with ids as HMACs, and all SQL on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import Connection, RowMapping, text

from server.storage.provider_deletions import add_provider_deletions

_COLUMNS = """
id, project_id, digests, secret_mark, began_at, deleted, deleted_at, deleted_again, finished_at,
unreadable, providers
"""
_FIND_UNFINISHED = text(f"""
SELECT {_COLUMNS} FROM person_deletions
 WHERE project_id = :project_id AND digests = CAST(:digests AS bytea[]) AND finished_at IS NULL
 ORDER BY id LIMIT 1
""")  # noqa: S608 - the columns are a constant
_BEGIN = text(f"""
INSERT INTO person_deletions (project_id, digests, secret_mark)
VALUES (:project_id, CAST(:digests AS bytea[]), :secret_mark) RETURNING {_COLUMNS}
""")  # noqa: S608 - as above
_READ = text(f"SELECT {_COLUMNS} FROM person_deletions WHERE id = :id")  # noqa: S608 - as above
_FIND_OF_PERSON = text(f"""
SELECT {_COLUMNS} FROM person_deletions
 WHERE project_id = :project_id AND digests && CAST(:digests AS bytea[]) ORDER BY id
""")  # noqa: S608 - as above
_ADD = """
UPDATE person_deletions SET {column} = {column} || jsonb_build_object(
    CAST(:place AS text), coalesce(CAST({column} ->> :place AS bigint), 0) + :count)
 WHERE id = :id
"""
_ADD_FIRST, _ADD_AGAIN = (
    text(_ADD.format(column=column)) for column in ("deleted", "deleted_again")
)
_WANT_PROVIDERS = text("""
UPDATE person_deletions
   SET providers = ARRAY(SELECT unnest(providers) UNION SELECT unnest(CAST(:providers AS text[]))
                          ORDER BY 1)
 WHERE id = :id
""")
_NOTE_FIRST = text("UPDATE person_deletions SET deleted_at = now() WHERE id = :id")
_FINISH = text("""
UPDATE person_deletions SET finished_at = now(), unreadable = CAST(:unreadable AS jsonb)
 WHERE id = :id
""")
_NOW = text("SELECT now()")


@dataclass(frozen=True)
class Receipt:
    """The receipt of a deletion, which has two passes; `deleted_at` is the end of the first."""

    id: int
    project_id: str
    digests: Sequence[bytes]
    secret_mark: bytes
    began_at: datetime
    deleted: Mapping[str, int]
    deleted_at: datetime | None
    deleted_again: Mapping[str, int]
    finished_at: datetime | None
    unreadable: Mapping[str, Sequence[int]]
    # Those that are asked to delete the person too, once the second pass has ended.
    providers: Sequence[str]


def begin_deletion(
    connection: Connection, project_id: str, digests: Sequence[bytes], secret_mark: bytes
) -> Receipt:
    """Return the receipt of a deletion: that of one to complete, or else a new one."""
    person = {"project_id": project_id, "digests": list(digests)}
    with connection.begin():
        row = connection.execute(_FIND_UNFINISHED, person).mappings().first()
        if row is None:
            begun = connection.execute(_BEGIN, person | {"secret_mark": secret_mark})
            row = begun.mappings().one()
        return _make_receipt(row)


def add_deleted(
    connection: Connection, receipt_id: int, place: str, count: int, *, again: bool
) -> None:
    """Count what was deleted from a place, in the transaction that deletes it."""
    values = {"id": receipt_id, "place": place, "count": count}
    connection.execute(_ADD_AGAIN if again else _ADD_FIRST, values)


def note_first_time(connection: Connection, receipt_id: int) -> None:
    """Note the end of the first pass."""
    with connection.begin():
        connection.execute(_NOTE_FIRST, {"id": receipt_id})


def want_providers(connection: Connection, receipt_id: int, providers: Sequence[str]) -> None:
    """Note that these providers are to be asked too."""
    with connection.begin():
        connection.execute(_WANT_PROVIDERS, {"id": receipt_id, "providers": list(providers)})


def finish_deletion(
    connection: Connection,
    receipt_id: int,
    unreadable: Mapping[str, Sequence[int]],
    sealed: Sequence[bytes],
) -> None:
    """Note the end of the second pass, and the numbers of what cannot be read.

    In the same transaction, what the providers are to be asked gets the ids, sealed.
    """
    with connection.begin():
        values = {"id": receipt_id, "unreadable": orjson.dumps(dict(unreadable)).decode()}
        connection.execute(_FINISH, values)
        add_provider_deletions(connection, receipt_id, sealed)


def read_receipt(connection: Connection, receipt_id: int) -> Receipt:
    """Return a receipt as it is now."""
    with connection.begin():
        return _make_receipt(connection.execute(_READ, {"id": receipt_id}).mappings().one())


def find_receipts(
    connection: Connection, project_id: str, digests: Sequence[bytes]
) -> list[Receipt]:
    """Return the receipts of a person, by any of the ids; the oldest first."""
    with connection.begin():
        values = {"project_id": project_id, "digests": list(digests)}
        rows = connection.execute(_FIND_OF_PERSON, values).mappings()
        return [_make_receipt(row) for row in rows]


def read_now(connection: Connection) -> datetime:
    """Return the database's time."""
    with connection.begin():
        now = connection.scalar(_NOW)
    assert isinstance(now, datetime)
    return now


def _make_receipt(row: RowMapping) -> Receipt:
    values: dict[str, Any] = dict(row)
    digests = [bytes(digest) for digest in values["digests"]]
    return Receipt(**values | {"digests": digests, "secret_mark": bytes(values["secret_mark"])})
