"""The loop that asks one provider to delete persons: claim, ask, record; later, ask how far it is.

The queue is a table, so that limits and waits hold for all forwarders together, and so that nothing
is lost if one is killed: what it had claimed is asked again when its lease ends.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from uuid import uuid4

from server import failpoints
from server.errors import Unavailable
from server.events.persons import Person, blot_ids
from server.forwarding import backoff
from server.forwarding.answers import quote_answer
from server.forwarding.backoff import backoff_seconds
from server.forwarding.http_client import Transport
from server.forwarding.providers.deletions import DeletionService, Ruling
from server.forwarding.providers.provider import Answer, NoAnswer, Request
from server.forwarding.queries import Queries
from server.forwarding.sender import send_before_stop
from server.privacy.digests import Digests
from server.privacy.sealing import Unsealable, unseal_person
from server.storage.outbox import Lease
from server.storage.provider_deletions import (
    ACCEPTED,
    FAILED,
    IMPOSSIBLE,
    UNKNOWN,
    WAITING,
    ClaimedDeletion,
    Progress,
    claim_deletion,
    record_progress,
)

_LEASE_SECONDS = 60.0
_POLL_SECONDS = 2.0
# Credentials that were refused, or a request that was: trying at once would not help.
_REFUSED_SECONDS = 300.0
# A job takes days.
_CHECK_SECONDS = 6 * 3600.0
_LONGEST_JOB = timedelta(days=60)
# The provider may not know yet whose events were delivered a moment ago.
_UNKNOWN_SECONDS = 900.0
_LONGEST_UNKNOWN = timedelta(hours=1)
_LOG_SECONDS = 60.0

_log = logging.getLogger("productgraph.forwarder")


class DeletionLane:
    """Asks one provider to delete persons, one after the other."""

    def __init__(
        self,
        service: DeletionService,
        transport: Transport,
        queries: Queries,
        digests: Digests,
        stop: asyncio.Event,
    ) -> None:
        self._service = service
        self._transport = transport
        self._queries = queries
        self._digests = digests
        self._stop = stop
        self._warned_at = float("-inf")

    async def run(self) -> None:
        """Ask until the forwarder is to stop."""
        while not self._stop.is_set():
            try:
                pause = 0.0 if await self.ask_next() else _POLL_SECONDS
            except Unavailable:
                pause = backoff.SHORTEST_SECONDS
            except Exception:  # noqa: BLE001 - the lane outlives whatever happens
                _log.exception("deletion failed", extra={"provider": self._service.name})
                pause = backoff.SHORTEST_SECONDS
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)

    async def ask_next(self) -> bool:
        """Ask what is due, and record the answer; return whether anything was."""
        name, lease = self._service.name, Lease(uuid4(), _LEASE_SECONDS)
        claimed = await self._queries.run(
            claim_deletion, name, lease, self._service.pause_seconds, self._digests.mark
        )
        if claimed is None:
            return False
        progress = await self._ask(claimed)
        failpoints.reach(failpoints.AFTER_PROVIDER)
        await self._queries.run(record_progress, name, lease.id, claimed.id, progress)
        self._log(claimed, progress)
        return True

    async def _ask(self, claimed: ClaimedDeletion) -> Progress:
        if claimed.sealed is None:
            return await self._ask_state(claimed, claimed.job or "")
        try:
            person = unseal_person(self._digests, claimed.sealed)
        except Unsealable:
            return Progress(WAITING, _REFUSED_SECONDS, error="its ids cannot be decrypted")
        return await self._ask_deletion(claimed, person)

    async def _ask_deletion(self, claimed: ClaimedDeletion, person: Person) -> Progress:
        request = self._service.request_deletion(person)
        if request is None:
            return Progress(IMPOSSIBLE, None, "it deletes nobody by anonymous ids")
        answer = await self._send(request)
        ruling = _read(answer, lambda known: self._service.read_deletion(person, known))
        if ruling is None:
            quoted = self._quote(request, answer)
            return _fail(WAITING, claimed.failures, answer, blot_ids(quoted, person))
        if ruling.state == UNKNOWN and claimed.now - claimed.requested_at < _LONGEST_UNKNOWN:
            return Progress(WAITING, _UNKNOWN_SECONDS, "not known there so far")
        return _follow(ruling)

    async def _ask_state(self, claimed: ClaimedDeletion, job: str) -> Progress:
        assert claimed.accepted_at is not None
        if claimed.now - claimed.accepted_at > _LONGEST_JOB:
            return Progress(
                FAILED, None, f"its end was not heard of within {_LONGEST_JOB.days} days"
            )
        answer = await self._send(self._service.request_state(job))
        ruling = _read(answer, lambda known: self._service.read_state(job, known))
        if ruling is not None:
            return _follow(ruling)
        # Not quoted: it may name the person, whose ids are not known here any more.
        return _fail(ACCEPTED, claimed.failures, answer, "")

    async def _send(self, request: Request) -> Answer | NoAnswer:
        return await send_before_stop(self._transport, request, self._stop)

    def _quote(self, request: Request, answer: Answer | NoAnswer) -> str:
        if isinstance(answer, NoAnswer):
            return ""
        return quote_answer(answer.body, [request.body], self._service.secrets)

    def _log(self, claimed: ClaimedDeletion, progress: Progress) -> None:
        extra = {"provider": self._service.name, "receipt": claimed.receipt_id}
        if progress.error is None:
            _log.info("a person's deletion: %s", progress.state, extra=extra)
        elif time.monotonic() - self._warned_at >= _LOG_SECONDS:
            self._warned_at = time.monotonic()
            _log.warning("a provider deletes nobody", extra=extra | {"answer": progress.error})


def _read(answer: Answer | NoAnswer, read: Callable[[Answer], Ruling | None]) -> Ruling | None:
    """Return what a successful answer says; None for any other, and for one without sense."""
    if isinstance(answer, NoAnswer) or not 200 <= answer.status < 300:
        return None
    return read(answer)


def _follow(ruling: Ruling) -> Progress:
    seconds = _CHECK_SECONDS if ruling.state == ACCEPTED else None
    return Progress(ruling.state, seconds, ruling.detail, ruling.job)


def _fail(state: str, failures: int, answer: Answer | NoAnswer, quoted: str) -> Progress:
    """Decide when to try again; what concerns the provider, not the person, pauses the lane."""
    wait = backoff_seconds(failures + 1)
    if isinstance(answer, NoAnswer):
        return Progress(state, wait, error=f"no answer ({answer.reason})", pause=wait)
    if 200 <= answer.status < 300:
        return Progress(state, wait, error=f"{answer.status}, but names no job", pause=wait)
    error = f"{answer.status} {quoted}".rstrip()
    if answer.status == 429 or answer.status >= 500:
        wait = max(wait, answer.retry_after)
        return Progress(state, wait, error=error, pause=wait)
    pause = None if answer.status == 400 else _REFUSED_SECONDS
    return Progress(state, _REFUSED_SECONDS, error=error, pause=pause)
