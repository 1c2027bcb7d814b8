"""A person's events wherever they are kept: found, and given out."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import orjson
from google.protobuf.message import DecodeError

from productgraph.v1.event_pb2 import Event
from server.events.persons import Person, read_ids
from server.events.spelling import name_fields, spell_event
from server.privacy.places import DEAD, EVENTS, OUTBOX, REJECTED
from server.protocols import GRPC, HTTP
from server.storage.connection import Connection
from server.storage.dead_events import read_dead_pages
from server.storage.person_events import list_parts, read_events
from server.storage.person_payloads import find_waiting, read_payloads, split_payload
from server.storage.rejected_events import StoredRejection, read_pages

Line = dict[str, Any]


class Export:
    """Reads a person's events, each as it is kept.

    `counts` has how many were found in each place; `unreadable` the numbers of what cannot be read,
    and so may be anybody's.
    """

    def __init__(self, connection: Connection, person: Person) -> None:
        self._connection = connection
        self._person = person
        self.counts: Counter[str] = Counter()
        self.unreadable: defaultdict[str, list[int]] = defaultdict(list)

    def run(self) -> Iterator[Line]:
        """Yield what is found, with its place: what moves on meanwhile is found in the next one."""
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
        for number, received_at, encoded in read_payloads(
            self._connection, self._person.project_id
        ):
            if not self._person.may_own(encoded):
                continue
            events = split_payload(encoded)
            owned = [] if events is None else self._find_owned(OUTBOX, number, events)
            if events is None:
                self.unreadable[OUTBOX].append(number)
            waiting = find_waiting(self._connection, number) if owned else []
            for place, event in owned:
                names = [name for name, places in waiting if places is None or place in places]
                about = {"number": number, "received_at": received_at, "waits_for": names}
                yield about | _spell(GRPC, event)

    def _find_owned(
        self, place: str, number: int, events: "list[bytes] | Any"
    ) -> list[tuple[int, bytes]]:
        owned = []
        for position, event in enumerate(events):
            if self._is_owned(place, number, GRPC, event):
                owned.append((position, event))
        return owned

    def _read_dead(self) -> Iterator[Line]:
        for page in read_dead_pages(self._connection, self._person.project_id):
            for letter in page:
                if self._is_owned(DEAD, letter.id, GRPC, letter.event):
                    names = ("provider", "died_at", "reason", "answer")
                    about = {"number": letter.id} | {each: getattr(letter, each) for each in names}
                    yield about | _spell(GRPC, letter.event)

    def _read_rejected(self) -> Iterator[Line]:
        for page in read_pages(self._connection, self._person.project_id, []):
            for each in page:
                if self._is_owned(REJECTED, each.id, each.protocol, each.event):
                    yield _describe_rejection(each)

    def _is_owned(self, place: str, number: int, protocol: str, event: bytes) -> bool:
        is_owned = self._person.owns(read_ids(protocol, event))
        if is_owned is None:
            self.unreadable[place].append(number)
        return bool(is_owned)


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
