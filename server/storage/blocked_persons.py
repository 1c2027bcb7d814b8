"""The table of blocked persons, by HMACs of their ids, and all SQL on it."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

_BLOCK = text("""
INSERT INTO blocked_persons (project_id, digest, secret_mark)
SELECT :project_id, unnest(CAST(:digests AS bytea[])), :secret_mark
    ON CONFLICT (project_id, digest) DO NOTHING
""")
_UNBLOCK = text("""
DELETE FROM blocked_persons WHERE project_id = :project_id AND digest = ANY(:digests)
""")
_FIND = text("""
SELECT digest, blocked_at FROM blocked_persons
 WHERE project_id = :project_id AND digest = ANY(:digests)
""")
_READ = text("SELECT project_id, digest FROM blocked_persons WHERE secret_mark = :secret_mark")
_COUNT_OTHERS = text("""
SELECT count(*) FROM blocked_persons
 WHERE secret_mark <> coalesce(CAST(:secret_mark AS bytea), ''::bytea)
""")
# The service asks this every few seconds: reading a hundred thousand rows each time costs more.
_READ_STATE = text("SELECT count(*), max(blocked_at) FROM blocked_persons")


class ListState(NamedTuple):
    """A fingerprint of the list; it misses a change if two are committed out of order."""

    size: int
    newest: datetime | None


def block_person(
    connection: Connection, project_id: str, digests: Sequence[bytes], secret_mark: bytes
) -> int:
    """Add a person's ids to the list, in the connection's transaction; return how many are new."""
    values = {"project_id": project_id, "digests": list(digests), "secret_mark": secret_mark}
    return connection.execute(_BLOCK, values).rowcount


def unblock_person(connection: Connection, project_id: str, digests: Sequence[bytes]) -> int:
    """Take a person's ids off the list, in the connection's transaction; return how many."""
    return connection.execute(
        _UNBLOCK, {"project_id": project_id, "digests": list(digests)}
    ).rowcount


def find_blocked(
    connection: Connection, project_id: str, digests: Sequence[bytes]
) -> dict[bytes, datetime]:
    """Return which of these digests are blocked, and since when."""
    rows = connection.execute(_FIND, {"project_id": project_id, "digests": list(digests)})
    return {bytes(digest): blocked_at for digest, blocked_at in rows}


def read_state(connection: Connection) -> ListState:
    """Return the fingerprint of the list."""
    return ListState(*connection.execute(_READ_STATE).one())


def read_blocked(connection: Connection, secret_mark: bytes) -> dict[str, set[bytes]]:
    """Return the digests that were made under a secret, by projects."""
    blocked: dict[str, set[bytes]] = {}
    for project_id, digest in connection.execute(_READ, {"secret_mark": secret_mark}):
        blocked.setdefault(project_id, set()).add(bytes(digest))
    return blocked


def count_unrecognised(connection: Connection, secret_mark: bytes | None) -> int:
    """Count the ids blocked under other secrets than this one; under all, if it is None."""
    return int(connection.scalar(_COUNT_OTHERS, {"secret_mark": secret_mark}) or 0)
