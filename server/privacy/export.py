"""Exports a person's events from every place where they are kept."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import orjson
from google.protobuf.message import DecodeError

from productgraph.v1.event_pb2 import Event
from server.events.persons import Person
from server.events.spelling import name_fields, spell_event
from server.privacy.places import DEAD, EVENTS, OUTBOX, REJECTED
from server.privacy.search import Search
from server.protocols import GRPC, HTTP
from server.storage.connection import Connection
from server.storage.person_events import list_parts, read_events
from server.storage.person_payloads import find_waiting
from server.storage.rejected_events import StoredRejection

Line = dict[str, Any]


class Export:
    """Reads a person's events, each as it is kept.

    `counts` has how many were found in each place; `unreadable` the numbers of what cannot be read,
    and so may be anybody's.
    """

    def __init__(self, connection: Connection, person: Person) -> None:
        self._connection = connection
        self._person = person
        self._search = Search(connection, person)
        self.counts: Counter[str] = Counter()
        self.unreadable = self._search.unreadable

    def run(self) -> Iterator[Line]:
        """Yield each event with its place; one that moves on is found in the next place."""
        parts = {
            EVENTS: self._read_events,
            OUTBOX: self._read_outbox,
            DEAD: self._read_dead,
            REJECTED: self._read_rejected,
        }
        for place, read in parts.items():
            for line in read():
                self.counts[place] += 1
                yield {"found_in": place, **line}

    def _read_events(self) -> Iterator[Line]:
        for part in list_parts(self._connection):
            for event in read_events(self._connection, self._person, part):
                yield {"received_at": event.received_at, "event": event.fields}

    def _read_outbox(self) -> Iterator[Line]:
        for payload in self._search.find_payloads():
            waiting = find_waiting(self._connection, payload.id)
            for place, event in payload.owned:
                names = [name for name, places in waiting if places is None or place in places]
                about = {"number": payload.id, "received_at": payload.received_at}
                yield about | {"waits_for": names} | _spell(GRPC, event)

    def _read_dead(self) -> Iterator[Line]:
        names = ("provider", "died_at", "reason", "answer")
        for letter in chain.from_iterable(self._search.find_dead()):
            about = {"number": letter.id} | {each: getattr(letter, each) for each in names}
            yield about | _spell(GRPC, letter.event)

    def _read_rejected(self) -> Iterator[Line]:
        return map(_describe_rejection, chain.from_iterable(self._search.find_rejected()))


def _describe_rejection(rejection: StoredRejection) -> Line:
    names = ("received_at", "protocol", "reason")
    about = {"number": rejection.id} | {each: getattr(rejection, each) for each in names}
    return about | _spell(rejection.protocol, rejection.event)


def _spell(protocol: str, event: bytes) -> Line:
    """Return an event by its names on the wire; as a text if it has no such form."""
    if protocol == HTTP:
        return {"event": orjson.Fragment(event)}
    try:
        fields = name_fields(Event.FromString(event))
    except DecodeError:
        fields = None
    return {"event": fields} if fields is not None else {"text": spell_event(protocol, event)}
