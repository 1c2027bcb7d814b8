"""The copies of a person's events, beside their rows in the events table."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

from server.events.persons import Person, read_ids
from server.privacy.places import DEAD, OUTBOX, REJECTED
from server.protocols import GRPC
from server.storage.connection import Connection
from server.storage.dead_events import DeadEvent, read_dead_pages
from server.storage.person_payloads import read_payloads, split_payload
from server.storage.rejected_events import StoredRejection, read_pages


class Payload(NamedTuple):
    """A payload of the outbox with events of a person, each with its position in the payload."""

    id: int
    received_at: datetime
    owned: Sequence[tuple[int, bytes]]


class Search:
    """Finds the copies of a person's events, a page of each table at a time.

    `unreadable` has the numbers of what cannot be read, by place: it may be anybody's.
    """

    def __init__(self, connection: Connection, person: Person) -> None:
        self._connection = connection
        self._person = person
        self.unreadable: defaultdict[str, list[int]] = defaultdict(list)

    def find_payloads(self) -> Iterator[Payload]:
        """Yield the payloads that hold any of the person's events."""
        for number, received_at, encoded in read_payloads(
            self._connection, self._person.project_id
        ):
            if not self._person.may_own(encoded):
                continue
            events = split_payload(encoded)
            if events is None:
                self.unreadable[OUTBOX].append(number)
                continue
            owned = [
                (position, event)
                for position, event in enumerate(events)
                if self._owns(OUTBOX, number, GRPC, event)
            ]
            if owned:
                yield Payload(number, received_at, owned)

    def find_dead(self) -> Iterator[list[DeadEvent]]:
        """Yield the person's dead events of each page."""
        for page in read_dead_pages(self._connection, self._person.project_id):
            yield [each for each in page if self._owns(DEAD, each.id, GRPC, each.event)]

    def find_rejected(self) -> Iterator[list[StoredRejection]]:
        """Yield the person's rejected events of each page."""
        for page in read_pages(self._connection, self._person.project_id, []):
            yield [
                each for each in page if self._owns(REJECTED, each.id, each.protocol, each.event)
            ]

    def _owns(self, place: str, number: int, protocol: str, event: bytes) -> bool:
        is_owned = self._person.owns(read_ids(protocol, event))
        if is_owned is None:
            self.unreadable[place].append(number)
        return bool(is_owned)
