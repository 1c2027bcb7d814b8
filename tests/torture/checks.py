"""The invariant: what is acknowledged is stored, once, and forwarded."""

import io
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from psycopg2.extensions import connection as Connection

from productgraph.v1.event_pb2 import Event
from server.events.encoded_events_pb2 import EncodedEvents
from tests.torture.cluster import Cluster
from tests.torture.events import PROJECT, Batch
from tests.torture.load import Load

_FILL = 'CREATE TEMP TABLE acknowledged (event_id text COLLATE "C") ON COMMIT DROP'
_RANGE = "project_id = %(project)s AND event_timestamp >= %(begin)s AND event_timestamp < %(end)s"
_FIND_LOST = f"""
SELECT event_id FROM acknowledged EXCEPT SELECT event_id FROM events WHERE {_RANGE}
"""
_FIND_DUPLICATED = f"""
SELECT event_id FROM events WHERE {_RANGE}
 GROUP BY project_id, event_timestamp, event_id HAVING count(*) > 1
"""
_FIND_STORED = f"SELECT event_id FROM events WHERE {_RANGE}"
_FIND_PENDING = """
SELECT d.provider, d.positions, p.events
  FROM outbox_deliveries d JOIN outbox_payloads p ON p.id = d.payload_id
"""
_FIND_DEAD = "SELECT provider, event, reason FROM dead_events"
_SHOWN = 3


@dataclass
class Ledger:
    """What clients have sent and been told, of one round or of several."""

    insert_ids: dict[str, str] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    rejected: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def add(self, load: Load) -> None:
        """Enter a round."""
        for batch in load.sent:
            self._add_batch(batch)
        for batch in load.acknowledged:
            self.acknowledged.update(batch.insert_ids)

    def _add_batch(self, batch: Batch) -> None:
        self.insert_ids |= batch.insert_ids
        self.rejected |= batch.rejected
        self.refused |= batch.refused


@dataclass
class Findings:
    """What the tables and the providers say of a ledger; the violations in words."""

    lost: int = 0
    duplicated: int = 0
    violations: list[str] = field(default_factory=list)

    def note(self, what: str, ids: Collection[str]) -> None:
        """Note a violation if there are any such ids."""
        if ids:
            some = ", ".join(sorted(ids)[:_SHOWN])
            self.violations.append(f"{len(ids)} {what}, such as {some}")


@dataclass
class _Tables:
    """A snapshot: ids of stored events, those that wait for each provider, the dead ones."""

    lost: list[str]
    duplicated: list[str]
    stored: set[str]
    pending: dict[str, set[str]]
    dead: dict[str, dict[str, str]]


def check(
    cluster: Cluster, ledger: Ledger, begin: datetime, end: datetime, *, is_over: bool = False
) -> Findings:
    """Compare the ledger with what is there; once all `is_over`, nothing may be pending."""
    # The tables come first: what has left the outbox since is with the provider already.
    tables = _read_tables(cluster, ledger.acknowledged, begin, end)
    findings = Findings(len(tables.lost), len(tables.duplicated))
    findings.note("acknowledged and not stored", tables.lost)
    findings.note("stored twice", tables.duplicated)
    findings.note("stored and never sent by us", tables.stored - ledger.insert_ids.keys())
    findings.note("never acknowledged", ledger.insert_ids.keys() - ledger.acknowledged)
    for name in cluster.providers:
        _check_provider(cluster, name, ledger, tables, findings, is_over)
    return findings


def _check_provider(
    cluster: Cluster,
    name: str,
    ledger: Ledger,
    tables: _Tables,
    findings: Findings,
    is_over: bool,
) -> None:
    provider, dead = cluster.providers[name], tables.dead[name]
    settled = dead.keys() if is_over else dead.keys() | tables.pending[name]
    open_ids = [ledger.insert_ids[i] for i in tables.stored - settled if i in ledger.insert_ids]
    findings.note(f"neither delivered to {name}, nor kept", provider.find_missing(open_ids))
    rejected = provider.find_arrived(list(ledger.rejected.values()))
    findings.note(f"rejected, and sent to {name}", rejected)
    findings.note(f"changed from one try for {name} to the next", provider.changed)
    known = dead.keys() & ledger.insert_ids.keys()
    findings.note(f"dead for {name}, which had not refused them", known - ledger.refused)
    findings.note(f"dead for {name} without a reason", {i for i in known if not dead[i]})


def _read_tables(
    cluster: Cluster, acknowledged: Iterable[str], begin: datetime, end: datetime
) -> _Tables:
    place = {"project": PROJECT, "begin": begin, "end": end}

    def read(connection: Connection) -> _Tables:
        connection.set_session(isolation_level="REPEATABLE READ")
        cursor = connection.cursor()

        def find(statement: str) -> list[Any]:
            cursor.execute(statement, place)
            return cursor.fetchall()

        cursor.execute(_FILL)
        cursor.copy_expert("COPY acknowledged FROM STDIN", io.StringIO("\n".join(acknowledged)))
        tables = _Tables(
            lost=[i for (i,) in find(_FIND_LOST)],
            duplicated=[i for (i,) in find(_FIND_DUPLICATED)],
            stored={i for (i,) in find(_FIND_STORED)},
            pending={name: set() for name in cluster.providers},
            dead={name: {} for name in cluster.providers},
        )
        for name, positions, payload in find(_FIND_PENDING):
            events = EncodedEvents.FromString(bytes(payload)).events
            chosen = events if positions is None else [events[at] for at in positions]
            tables.pending[name] |= {Event.FromString(event).event_id for event in chosen}
        for name, event, reason in find(_FIND_DEAD):
            tables.dead[name][Event.FromString(bytes(event)).event_id] = reason
        return tables

    return cluster.use_connection(read)
