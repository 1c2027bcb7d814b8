"""API keys: made, listed, limited, revoked and found in their table."""

import base64
import hashlib
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

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
    update,
)

from server.caller import Caller

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
)


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
) -> str:
    """Add a key to a project and return it: it cannot be had again."""
    key = generate_key()
    values = {"project_id": project_id, "name": name, "digest": digest_key(key)}
    rates = {"event_rate": event_rate, "byte_rate": byte_rate}
    connection.execute(_TABLE.insert().values(values | rates))
    return key


def list_keys(connection: Connection) -> list[ApiKey]:
    """All keys, revoked ones too, oldest first."""
    columns = [column for column in _TABLE.columns if column.name != "digest"]
    rows = connection.execute(select(*columns).order_by(_TABLE.c.id))
    return [ApiKey(**row._mapping) for row in rows]


def revoke_key(connection: Connection, key_id: int) -> bool:
    """Revokes a key; False where there is none of this id, or it had been revoked."""
    is_active = (_TABLE.c.id == key_id) & _TABLE.c.revoked_at.is_(None)
    statement = update(_TABLE).where(is_active).values(revoked_at=func.now())
    return connection.execute(statement).rowcount == 1


def limit_key(connection: Connection, key_id: int, **rates: int | None) -> bool:
    """Set a key's `event_rate`, `byte_rate` or both; return False if there is no such id."""
    statement = update(_TABLE).where(_TABLE.c.id == key_id).values(rates)
    return connection.execute(statement).rowcount == 1


def find_callers(connection: Connection, digests: Collection[bytes]) -> dict[bytes, Caller]:
    """Whose those digests are that belong to a key that is not revoked."""
    table = _TABLE.c
    is_active = table.digest.in_(digests) & table.revoked_at.is_(None)
    wanted = (table.digest, table.project_id, table.id, table.event_rate, table.byte_rate)
    rows = connection.execute(select(*wanted).where(is_active))
    return {bytes(digest): Caller(*columns) for digest, *columns in rows}


def record_use(connection: Connection, digests: Collection[bytes]) -> None:
    """Note that these keys were in use until now."""
    is_used = _TABLE.c.digest.in_(digests)
    connection.execute(update(_TABLE).where(is_used).values(last_used_at=func.now()))
