"""Finds deleted persons whom a restored backup has brought back, by their receipts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from server.events.persons import EventIds, Person, read_ids
from server.privacy.digests import Digests
from server.protocols import GRPC
from server.storage.connection import Connection
from server.storage.dead_events import read_dead_pages
from server.storage.person_events import read_all_ids
from server.storage.person_payloads import read_payloads, split_payload
from server.storage.rejected_events import read_pages


def recognise_persons(
    connection: Connection, digests: Digests, receipts: Sequence[Mapping[str, Any]]
) -> Iterator[Person]:
    """Yield a person for each receipt, read from JSON, with those of its ids that are back."""
    by_project: dict[str, list[frozenset[str]]] = {}
    for receipt in receipts:
        wanted = by_project.setdefault(receipt["project_id"], [])
        wanted.append(frozenset(receipt["digests"]))
    for project_id, wanted in by_project.items():
        found = _find(
            digests, project_id, frozenset().union(*wanted), _list(connection, project_id)
        )
        for one in dict.fromkeys(wanted):
            users = [each for each, digest in found[0].items() if digest in one]
            anonymous = [each for each, digest in found[1].items() if digest in one]
            if users or anonymous:
                yield Person(project_id, users[0] if users else None, tuple(anonymous))


def _find(
    digests: Digests, project_id: str, wanted: frozenset[str], kept: Iterable[EventIds]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the users and the anonymous ids that are wanted, with their digests."""
    users: dict[str, str] = {}
    anonymous: dict[str, str] = {}
    for ids in kept:
        for each, found, digest in (
            (ids.user, users, digests.of_user),
            (ids.anonymous, anonymous, digests.of_anonymous),
        ):
            if each and (name := digest(project_id, each).hex()) in wanted:
                found[each] = name
    return users, anonymous


def _list(connection: Connection, project_id: str) -> Iterator[EventIds]:
    """Yield the ids of all that is kept of a project, many of them repeatedly."""
    yield from read_all_ids(connection, project_id)
    for _, _, encoded in read_payloads(connection, project_id):
        for event in split_payload(encoded) or ():
            yield read_ids(GRPC, event)
    for page in read_dead_pages(connection, project_id):
        yield from (read_ids(GRPC, each.event) for each in page)
    for rows in read_pages(connection, project_id, []):
        yield from (read_ids(row.protocol, row.event) for row in rows)
