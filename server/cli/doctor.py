"""`productgraph doctor`: tells what is left to do for production."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

import click

from server.cli.command import (
    Failure,
    json_option,
    make_printable,
    opened_engine,
    print_json,
    with_settings,
)
from server.config import Settings
from server.storage.checkup import (
    DatabaseFacts,
    describe_month,
    keeps_transactions_whole,
    read_facts,
)
from server.storage.citus import can_change_tables, has_citus
from server.storage.connection import Connection, connected
from server.storage.distribution import find_undone
from server.storage.errors import DatabaseError
from server.storage.indexes import count_missing_indexes
from server.storage.keys import ApiKey, list_keys
from server.storage.rights import find_missing_rights
from server.telemetry.metrics_page import DOCTOR, LAST_SCRAPE

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ANY = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
_LONG = timedelta(days=400)
_UNUSED = timedelta(days=7)
_SCRAPED_SECONDS = 300.0


class Finding(NamedTuple):
    """What was looked at, what is to be done about it if anything, and otherwise what was found."""

    name: str
    remedy: str | None
    found: str = ""


@click.command()
@json_option
@with_settings
def doctor(settings: Settings, as_json: bool) -> None:
    """Tell what is left to do for production.

    Looks at the settings, the database and the running service, each with its remedy. The exit code
    is 1 if something is left.
    """
    findings = [*_look_at_settings(settings), *_look_at_database(settings), _look_at_page(settings)]
    if as_json:
        print_json(
            {"name": each.name, "is_done": each.remedy is None, "text": each.remedy or each.found}
            for each in findings
        )
    else:
        for each in findings:
            mark = "todo" if each.remedy else "ok"
            click.echo(make_printable(f"{mark:4}  {each.name}: {each.remedy or each.found}"))
    if left := sum(each.remedy is not None for each in findings):
        raise Failure(f"{left} left to do")


def _look_at_settings(settings: Settings) -> Iterator[Finding]:
    embedded = settings.database_url is None
    remedy = "set DATABASE_URL: the embedded PostgreSQL has no backup and no standby"
    yield Finding("database", remedy if embedded else None, "PostgreSQL of your own")
    is_open = settings.host not in _LOOPBACK and settings.grpc_tls is None
    remedy = "put a proxy with TLS in front, or set GRPC_TLS_CERT_FILE and GRPC_TLS_KEY_FILE"
    yield Finding("TLS of the gRPC port", remedy if is_open else None, "TLS, or this machine only")


def _look_at_database(settings: Settings) -> Iterator[Finding]:
    with opened_engine(settings) as engine:
        yield _try("pooler", lambda: keeps_transactions_whole(engine))
        with connected(engine) as connection:
            facts, lacking = read_facts(connection), find_missing_rights(connection)
            keys = list_keys(connection)
            missing = count_missing_indexes(connection)
            nodes = _look_at_nodes(connection)
    yield _judge_rights(facts, lacking, embedded=settings.database_url is None)
    yield from _judge(facts)
    remedy = f"run migrate: {missing} partitions lack the index on received_at" if missing else None
    yield Finding("indexes", remedy, "built")
    yield from nodes
    yield _look_at_keys(keys)


def _look_at_nodes(connection: Connection) -> list[Finding]:
    """Look at the distribution over the nodes of Citus, of which only the coordinator tells."""
    if not (has_citus(connection) and can_change_tables(connection)):
        return []
    try:
        undone = find_undone(connection)
    except DatabaseError as error:
        undone = [str(error)]
    remedy = f"run distribute: {'; '.join(undone)}" if undone else None
    return [Finding("nodes", remedy, "the tables are distributed")]


def _try(name: str, check: Callable[[], bool]) -> Finding:
    try:
        works = check()
    except DatabaseError:
        works = False
    remedy = "give the pooler pool_mode = transaction or session"
    return Finding(name, None if works else remedy, "transactions stay on one connection")


def _judge_rights(facts: DatabaseFacts, lacking: Sequence[str], *, embedded: bool) -> Finding:
    remedy = None
    if facts.is_superuser and not embedded:
        remedy = "use an account that is no superuser"
    elif lacking:
        remedy = f"run scripts/deploy/roles.sql: the account lacks {'; '.join(lacking)}"
    return Finding("rights", remedy, "all that the service needs, no superuser")


def _judge(facts: DatabaseFacts) -> Iterator[Finding]:
    is_safe = facts.is_local or facts.is_encrypted
    remedy = "add ?sslmode=verify-full to DATABASE_URL"
    yield Finding("TLS to PostgreSQL", None if is_safe else remedy, "encrypted, or a local socket")
    yield Finding("durability", _find_danger(facts), "commits wait for the disk")
    missing = facts.list_missing_months(datetime.now(UTC).date())
    remedy = f"run migrate, each day if the service must not make them: no {', '.join(missing)}"
    yield Finding("partitions", remedy if missing else None, "made ahead")
    oldest = facts.find_oldest_month()
    is_old = bool(oldest) and describe_month(str(oldest)) < datetime.now() - _LONG  # noqa: DTZ005
    remedy = f"run retention daily: {oldest} is still there"
    found = f"the oldest month is {oldest}" if oldest else "no month has a partition yet"
    yield Finding("retention", remedy if is_old else None, found)


def _find_danger(facts: DatabaseFacts) -> str | None:
    if not facts.has_fsync:
        return "set fsync = on: a crash of the machine loses events that were acknowledged"
    if not facts.has_full_page_writes:
        return "set full_page_writes = on: a crash of the machine may damage the tables"
    if not facts.has_autovacuum:
        return "set autovacuum = on: tables and their indexes grow without it"
    if facts.synchronous_commit == "off":
        return "set synchronous_commit = on: off is overruled for events, but not for API keys"
    if facts.synchronous_commit == "local" and facts.has_synchronous_standby:
        return "set synchronous_commit = on: local does not wait for the standby"
    return None


def _look_at_keys(keys: Sequence[ApiKey]) -> Finding:
    now = datetime.now(UTC)
    valid = [key for key in keys if key.is_valid(now)]
    if not valid:
        return Finding("API keys", "make one: keys create --project …")
    cut = now - _UNUSED
    unused = [key for key in valid if key.last_used_at is None and key.created_at < cut]
    numbers = ", ".join(f"{key.id} ({key.project_id})" for key in unused[:5])
    more = f" and {len(unused) - 5} others" if len(unused) > 5 else ""
    remedy = f"revoke those that were never used: {numbers}{more}" if unused else None
    return Finding("API keys", remedy, f"{len(valid)} valid, none unused for a week")


def _look_at_page(settings: Settings) -> Finding:
    name, load = "alerts", "and load scripts/deploy/alerts.yml"
    if not settings.metrics_port:
        return Finding(name, f"set METRICS_PORT, let Prometheus read it, {load}")
    host = "127.0.0.1" if settings.host in _ANY else settings.host
    host = f"[{host}]" if ":" in host else host
    try:
        page = _read_page(f"http://{host}:{settings.metrics_port}/metrics")
    except (OSError, URLError):
        return Finding(name, f"start the service: its metrics on {host} do not answer")
    found = re.search(rf"^{LAST_SCRAPE} (\S+)$", page, re.MULTILINE)
    age = time.time() - (float(found[1]) if found else 0.0)
    if age > _SCRAPED_SECONDS:
        return Finding(name, f"let Prometheus read the metrics ({host}), {load}")
    return Finding(name, None, f"metrics were read {max(0.0, age):.0f} s ago")


def _read_page(url: str) -> str:
    request = Request(url, headers={"User-Agent": DOCTOR})  # noqa: S310 - our own http URL
    with build_opener(ProxyHandler({})).open(request, timeout=5) as answer:
        return str(answer.read().decode())
