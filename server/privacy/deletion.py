"""A person's events deleted wherever they are kept, beside a running service.

The places are searched in the order in which an event passes through them: payloads that are being
sent are waited for, and an event that a forwarder buries meanwhile is found among the dead ones. A
second pass follows once no worker can hold an earlier event in memory.

Providers are asked after that: nothing of the person waits for them any more.

Every step is a transaction of its own that counts in the receipt what it deletes. Whatever ends the
command, the next one with the same ids goes on with the same receipt.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Concatenate, ParamSpec

from server import failpoints
from server.events.persons import Person, hide_ids, read_ids, texts_naming
from server.privacy.digests import Digests
from server.privacy.places import ANSWERS, DEAD, EVENTS, OUTBOX, REJECTED
from server.privacy.sealing import seal_person
from server.privacy.search import Search
from server.protocols import GRPC
from server.storage.connection import Connection
from server.storage.dead_events import change_texts, delete_dead
from server.storage.lanes import change_trouble
from server.storage.person_deletions import (
    Receipt,
    add_deleted,
    begin_deletion,
    finish_deletion,
    note_first_time,
    read_now,
    read_receipt,
    want_providers,
)
from server.storage.person_events import delete_arrived_events, delete_events, list_parts
from server.storage.person_payloads import rewrite_payload
from server.storage.provider_deletions import ProviderDeletion
from server.storage.rejected_events import KEPT_WITHIN_SECONDS, delete_rejections

# What was in a transaction when the deletion began may have an earlier time of arrival.
_OVERLAP = timedelta(minutes=10)
_RETRY_SECONDS = 1.0
_ROUNDS_PER_REPORT = 10
# The state at a provider until the second pass has ended.
PLANNED = "planned"

P = ParamSpec("P")


class Deletion:
    """Deletes a person's events. Calls `report` with a sentence whenever it has to wait."""

    def __init__(
        self,
        connection: Connection,
        person: Person,
        digests: Digests,
        report: Callable[[str], None],
    ) -> None:
        self._connection = connection
        self._person = person
        self._digests = digests
        self._report = report
        of_person = digests.of_person(person)
        self._receipt = begin_deletion(connection, person.project_id, of_person, digests.mark)
        self._is_again = self._receipt.deleted_at is not None
        self._search = Search(connection, person)

    def run(self, *, wait: bool, providers: Sequence[str] = ()) -> Receipt:
        """Make both passes, and return the receipt; then these providers are to be asked too.

        Without `wait`, return after the first pass if the second is not due yet.
        """
        if providers:
            want_providers(self._connection, self._receipt.id, providers)
        if not self._is_again:
            for part in list_parts(self._connection):
                self._delete(EVENTS, delete_events, self._person, part)
            self._delete_copies()
            note_first_time(self._connection, self._receipt.id)
            self._receipt, self._is_again = self._read_receipt(), True
        if self._is_due(wait):
            self._delete_again()
        return self._read_receipt()

    def _read_receipt(self) -> Receipt:
        return read_receipt(self._connection, self._receipt.id)

    def _is_due(self, wait: bool) -> bool:
        """Return whether the second pass is due; if `wait`, wait until it is."""
        due_at = find_second_time(self._receipt)
        assert due_at is not None
        left = (due_at - read_now(self._connection)).total_seconds()
        if left > 0 and wait:
            self._report(f"waiting for {due_at:%H:%M:%S} UTC, to look once more")
            time.sleep(left)
        return left <= 0 or wait

    def _delete_again(self) -> None:
        since = self._receipt.began_at - _OVERLAP
        self._search.unreadable.clear()
        self._delete(EVENTS, delete_arrived_events, self._person, since)
        self._delete_copies()
        sealed = list(seal_person(self._digests, self._person))
        finish_deletion(self._connection, self._receipt.id, self._search.unreadable, sealed)

    def _delete_copies(self) -> None:
        self._empty_payloads()
        for dead in self._search.find_dead():
            self._delete(DEAD, delete_dead, [each.id for each in dead])
        for rejected in self._search.find_rejected():
            self._delete(REJECTED, delete_rejections, [each.id for each in rejected])
        self._delete(ANSWERS, self._hide_answers)

    def _delete(
        self,
        place: str,
        work: Callable[Concatenate[Connection, P], int],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Do one step, and count in the same transaction what it has deleted."""
        with self._connection.begin():
            if count := work(self._connection, *args, **kwargs):
                receipt_id, again = self._receipt.id, self._is_again
                add_deleted(self._connection, receipt_id, place, count, again=again)
        if count:
            failpoints.reach(failpoints.AFTER_DELETION)

    def _empty_payloads(self) -> None:
        """Take the person's events out of the payloads; those being sent once they are not."""
        busy = [payload.id for payload in self._search.find_payloads()]
        rounds = 0
        while busy := [number for number in busy if not self._empty_payload(number)]:
            if rounds % _ROUNDS_PER_REPORT == 0:
                self._report(f"waiting for {len(busy)} payloads that are being sent")
            rounds += 1
            time.sleep(_RETRY_SECONDS)

    def _empty_payload(self, number: int) -> bool:
        """Take the person's events out of a payload; return False if some of it is being sent."""
        is_free = True

        def rewrite(connection: Connection) -> int:
            nonlocal is_free
            count = rewrite_payload(connection, number, self._is_others)
            is_free = count is not None
            return count or 0

        self._delete(OUTBOX, rewrite)
        return is_free

    def _is_others(self, event: bytes) -> bool:
        return not self._person.owns(read_ids(GRPC, event))

    def _hide_answers(self, connection: Connection) -> int:
        """Hide the ids in what providers answered about the events of others."""

        def hide(text: str) -> str:
            return hide_ids(text, self._person)

        changed = change_texts(connection, texts_naming(self._person), hide)
        return changed + change_trouble(connection, hide)


def find_second_time(receipt: Receipt) -> datetime | None:
    """Return when the second pass is due, or None before the end of the first."""
    if receipt.deleted_at is None:
        return None
    return receipt.deleted_at + timedelta(seconds=KEPT_WITHIN_SECONDS)


def describe_receipt(receipt: Receipt, asked: Sequence[ProviderDeletion] = ()) -> Mapping[str, Any]:
    """Return what a receipt says, and what the providers said that were asked, for JSON."""
    return {
        "receipt": receipt.id,
        "project_id": receipt.project_id,
        "digests": [digest.hex() for digest in receipt.digests],
        "secret_mark": receipt.secret_mark.hex(),
        "began_at": receipt.began_at,
        "deleted": _list_counts(receipt.deleted),
        "deleted_at": receipt.deleted_at,
        "again_at": find_second_time(receipt),
        "deleted_again": _list_counts(receipt.deleted_again),
        "finished_at": receipt.finished_at,
        "unreadable": receipt.unreadable,
        "providers": [*map(_describe_asked, asked)]
        or [{"provider": name, "state": PLANNED} for name in receipt.providers],
    }


def _describe_asked(asked: ProviderDeletion) -> Mapping[str, Any]:
    return {name: value for name, value in asdict(asked).items() if name != "receipt_id"}


def _list_counts(counts: Mapping[str, int]) -> Mapping[str, int]:
    places: Sequence[str] = (EVENTS, OUTBOX, DEAD, REJECTED, ANSWERS)
    return {place: counts.get(place, 0) for place in places}
