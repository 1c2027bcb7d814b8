"""API keys: made, listed, limited, replaced, revoked and found in their table."""

import base64
import hashlib
import re
import secrets
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    LargeBinary,
    MetaData,
    Table,
    Text,
    func,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from server.caller import Caller, Quota

_PREFIX = "pgk_"
_SECRET_BYTES, _CHECKSUM_BYTES = 20, 5
_SHAPE = re.compile(r"pgk_[a-z2-7]{40}", re.ASCII)

_TABLE = Table(
    "api_keys",
    MetaData(),
    Column("id", BigInteger, primary_key=True),
    Column("project_id", Text),
    Column("name", Text),
    Column("digest", LargeBinary),
    Column("created_at", DateTime(timezone=True)),
    Column("last_used_at", DateTime(timezone=True)),
    Column("revoked_at", DateTime(timezone=True)),
    Column("event_rate", BigInteger),
    Column("byte_rate", BigInteger),
    Column("expires_at", DateTime(timezone=True)),
    Column("retires_at", DateTime(timezone=True)),
    Column("replaces", BigInteger),
    Column("origins", ARRAY(Text)),
)
_ENDS_AT = func.least(_TABLE.c.expires_at, _TABLE.c.retires_at)  # null if both are
_QUOTAS = Table(
    "quotas",
    MetaData(),
    Column("project_id", Text, primary_key=True),
    Column("daily", BigInteger),
    Column("monthly", BigInteger),
)
_KNOWN = [column for column in _TABLE.columns if column.name != "digest"]
_IS_VALID = _TABLE.c.revoked_at.is_(None) & func.coalesce(func.now() < _ENDS_AT, True)

# The days of which the last use is kept.
_DAYS = 90
_TODAY = "CAST(now() AT TIME ZONE 'UTC' AS date)"
# Rows are locked in the order of their ids, since the workers of all machines do this.
_RECORD_USE = text(f"""
WITH used AS (
    SELECT id FROM api_keys WHERE digest = ANY(:digests) ORDER BY id FOR UPDATE
), noted AS (
    UPDATE api_keys SET last_used_at = now() FROM used WHERE api_keys.id = used.id
), forgotten AS (
    DELETE FROM api_key_uses USING used WHERE key_id = id AND day < {_TODAY} - :days
)
INSERT INTO api_key_uses (key_id, day, last_used_at)
SELECT id, {_TODAY}, now() FROM used ORDER BY id
    ON CONFLICT (key_id, day) DO UPDATE SET last_used_at = excluded.last_used_at
""")  # noqa: S608 - nothing in it comes from outside
_LIST_USES = text("""
SELECT day, last_used_at FROM api_key_uses WHERE key_id = :id ORDER BY day DESC LIMIT :days
""")

# A key that is in use and about to end is announced this long before; one that has a successor
# only when its grace is nearly over.
ENDING, REPLACED_ENDING = timedelta(days=7), timedelta(days=1)
_IN_USE = timedelta(days=2)


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key; the key itself is not kept."""

    id: int
    project_id: str
    name: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None
    event_rate: int | None
    byte_rate: int | None
    # The end that it was made with, and the one that it got when another key took its place.
    expires_at: datetime | None = None
    retires_at: datetime | None = None
    # The number of the key whose place it takes.
    replaces: int | None = None
    # The origins of the pages that may use it; None: all.
    origins: list[str] | None = None

    @property
    def ends_at(self) -> datetime | None:
        """Return when it ends, unless it is revoked earlier."""
        return min(filter(None, (self.expires_at, self.retires_at)), default=None)

    def is_valid(self, now: datetime) -> bool:
        """Return whether it can be used."""
        return self.revoked_at is None and (self.ends_at is None or self.ends_at > now)

    def is_ending(self, now: datetime) -> bool:
        """Return whether it ends soon though it is in use."""
        if not self.is_valid(now) or self.ends_at is None or self.last_used_at is None:
            return False
        notice = REPLACED_ENDING if self.retires_at else ENDING
        return self.ends_at <= now + notice and self.last_used_at > now - _IN_USE

    def describe(self, now: datetime) -> dict[str, object]:
        """Return all that is known of it, for JSON."""
        return {**asdict(self), "ends_at": self.ends_at, "is_valid": self.is_valid(now)}


@dataclass(frozen=True)
class KeyUse:
    """The last use of a key on a day (UTC)."""

    day: date
    last_used_at: datetime


class KeyReplaced(Exception):
    """A key has been replaced already; the text says by which one."""


def generate_key() -> str:
    """Return a new key: `pgk_` and, in base 32, 160 random bits and a checksum."""
    secret = secrets.token_bytes(_SECRET_BYTES)
    return _PREFIX + base64.b32encode(secret + _checksum(secret)).decode().lower()


def is_well_formed(key: str) -> bool:
    """Whether a key could have been made by `generate_key`."""
    if not _SHAPE.fullmatch(key):
        return False
    content = base64.b32decode(key.removeprefix(_PREFIX).upper())
    return content[_SECRET_BYTES:] == _checksum(content[:_SECRET_BYTES])


def _checksum(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()[:_CHECKSUM_BYTES]


def digest_key(key: str) -> bytes:
    """Return what is kept of a key: its SHA-256, unsalted since a key is random itself."""
    return hashlib.sha256(key.encode()).digest()


def create_key(
    connection: Connection,
    project_id: str,
    name: str,
    event_rate: int | None = None,
    byte_rate: int | None = None,
    *,
    lifetime: timedelta | None = None,
    origins: Collection[str] | None = None,
    replaces: int | None = None,
) -> str:
    """Add a key to a project and return it: it cannot be had again."""
    key = generate_key()
    values = {
        "project_id": project_id,
        "name": name,
        "digest": digest_key(key),
        "event_rate": event_rate,
        "byte_rate": byte_rate,
        "expires_at": None if lifetime is None else func.now() + lifetime,
        "origins": None if origins is None else sorted(origins),
        "replaces": replaces,
    }
    connection.execute(_TABLE.insert().values(values))
    return key


def replace_key(
    connection: Connection, key_id: int, grace: timedelta, lifetime: timedelta | None = None
) -> str | None:
    """Make the next key of one that then ends after `grace`; None if that is not valid.

    The next one is like it, and has its lifetime unless another one is given. Raises KeyReplaced if
    it has a valid successor already.
    """
    table = _TABLE.c
    locked = select(*_KNOWN).where((table.id == key_id) & _IS_VALID).with_for_update()
    if (row := connection.execute(locked).one_or_none()) is None:
        return None
    old = ApiKey(**row._mapping)
    if successor := connection.scalar(
        select(table.id).where((table.replaces == old.id) & _IS_VALID)
    ):
        raise KeyReplaced(
            f"key {old.id} has been replaced by key {successor}: revoke that one first"
        )
    if lifetime is None and old.expires_at is not None:
        lifetime = old.expires_at - old.created_at
    retired = update(_TABLE).where(table.id == old.id).values(retires_at=func.now() + grace)
    connection.execute(retired)
    return create_key(
        connection,
        old.project_id,
        old.name,
        old.event_rate,
        old.byte_rate,
        lifetime=lifetime,
        origins=old.origins,
        replaces=old.id,
    )


def list_keys(connection: Connection) -> list[ApiKey]:
    """All keys, revoked ones too, oldest first."""
    rows = connection.execute(select(*_KNOWN).order_by(_TABLE.c.id))
    return [ApiKey(**row._mapping) for row in rows]


def find_key(connection: Connection, key_id: int) -> ApiKey | None:
    """Return what is known of a key, or None if there is no such id."""
    row = connection.execute(select(*_KNOWN).where(_TABLE.c.id == key_id)).one_or_none()
    return None if row is None else ApiKey(**row._mapping)


def find_successor(connection: Connection, key_id: int) -> int | None:
    """Return the newest key that has taken a key's place."""
    newest = select(func.max(_TABLE.c.id)).where(_TABLE.c.replaces == key_id)
    successor: int | None = connection.scalar(newest)
    return successor


def count_ending(connection: Connection) -> int:
    """Return how many keys end soon though they are in use."""
    soon = _IS_VALID & (func.now() + ENDING >= _ENDS_AT)
    rows = connection.execute(select(*_KNOWN).where(soon))
    now = datetime.now(UTC)
    return sum(ApiKey(**row._mapping).is_ending(now) for row in rows)


def list_uses(connection: Connection, key_id: int) -> list[KeyUse]:
    """Return the last use of a key on each day, the latest first."""
    rows = connection.execute(_LIST_USES, {"id": key_id, "days": _DAYS})
    return [KeyUse(**row._mapping) for row in rows]


def revoke_key(connection: Connection, key_id: int) -> bool:
    """Revokes a key; False where there is none of this id, or it had been revoked."""
    is_active = (_TABLE.c.id == key_id) & _TABLE.c.revoked_at.is_(None)
    statement = update(_TABLE).where(is_active).values(revoked_at=func.now())
    return connection.execute(statement).rowcount == 1


def limit_key(connection: Connection, key_id: int, **rates: int | None) -> bool:
    """Set a key's `event_rate`, `byte_rate` or both; return False if there is no such id."""
    statement = update(_TABLE).where(_TABLE.c.id == key_id).values(rates)
    return connection.execute(statement).rowcount == 1


def allow_origins(connection: Connection, key_id: int, origins: Collection[str] | None) -> bool:
    """Set the origins of the pages that may use a key, None for all; False if there is no id."""
    listed = None if origins is None else sorted(origins)
    statement = update(_TABLE).where(_TABLE.c.id == key_id).values(origins=listed)
    return connection.execute(statement).rowcount == 1


def find_callers(connection: Connection, digests: Collection[bytes]) -> dict[bytes, Caller]:
    """Return the callers of those digests that belong to a valid key."""
    table, quota = _TABLE.c, _QUOTAS.c
    wanted = (table.digest, table.project_id, table.id, table.event_rate, table.byte_rate)
    limits = (table.origins, quota.daily, quota.monthly)
    joined = _TABLE.outerjoin(_QUOTAS, table.project_id == quota.project_id)
    statement = select(*wanted, *limits).select_from(joined)
    rows = connection.execute(statement.where(table.digest.in_(digests) & _IS_VALID))
    return {bytes(digest): _make_caller(*columns) for digest, *columns in rows}


def _make_caller(
    project_id: str,
    key_id: int,
    event_rate: int | None,
    byte_rate: int | None,
    origins: list[str] | None,
    *limits: int | None,
) -> Caller:
    pages = None if origins is None else frozenset(origins)
    quota = Quota(*limits)
    return Caller(
        project_id, key_id, event_rate, byte_rate, pages, None if quota == Quota() else quota
    )


def record_use(connection: Connection, digests: Collection[bytes]) -> None:
    """Note that these keys were in use until now."""
    connection.execute(_RECORD_USE, {"digests": list(digests), "days": _DAYS})
