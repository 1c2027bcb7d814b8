"""The providers' stand-ins, which remember in little memory what came to them."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tests.support.provider_servers import (
    AmplitudeServer,
    Event,
    MixpanelServer,
    ProviderServer,
    Reply,
    Script,
)
from tests.torture.events import REFUSED_USER

AMPLITUDE_KEY = "amplitude-s3cret-4b1d"
MIXPANEL_TOKEN = "mixpanel-s3cret-9e27"


@dataclass(slots=True)
class Arrival:
    """An event that came at least once; times are of `time.monotonic`."""

    digest: bytes
    ingested_at: float | None = None
    # Tries after the provider had it, and the seconds since, of the quickest.
    repeats: int = 0
    soonest_repeat: float = float("inf")


class Remembering(ProviderServer):
    """Remembers each event by its insert id, and which of them changed from try to try."""

    def __init__(self, credential: str) -> None:
        super().__init__(credential)
        self.arrivals: dict[str, Arrival] = {}
        self.changed: set[str] = set()

    def find_missing(self, insert_ids: Sequence[str]) -> set[str]:
        """Return those that the provider does not have."""
        with self._lock:
            return {i for i in insert_ids if not self._has(i)}

    def find_arrived(self, insert_ids: Sequence[str]) -> set[str]:
        """Return those that came, whatever the answer was."""
        with self._lock:
            return set(insert_ids) & self.arrivals.keys()

    def _has(self, insert_id: str) -> bool:
        arrival = self.arrivals.get(insert_id)
        return arrival is not None and arrival.ingested_at is not None

    def find_hasty_repeats(self, seconds: float) -> int:
        """Return how many events came again within this many seconds of having been taken."""
        with self._lock:
            return sum(a.soonest_repeat < seconds for a in self.arrivals.values())

    def forget_repeats(self) -> None:
        """Start `find_hasty_repeats` anew."""
        with self._lock:
            for arrival in self.arrivals.values():
                arrival.soonest_repeat = float("inf")

    def _record(self, events: Sequence[Event], reply: Reply) -> None:
        now = time.monotonic()
        for index, event in enumerate(events):
            insert_id, digest = str(self._read_insert_id(event)), _digest(event)
            arrival = self.arrivals.setdefault(insert_id, Arrival(digest))
            if arrival.digest != digest:
                self.changed.add(insert_id)
            if arrival.ingested_at is not None:
                arrival.repeats += 1
                gap = now - arrival.ingested_at
                arrival.soonest_repeat = min(arrival.soonest_repeat, gap)
            elif index in reply.ingest:
                arrival.ingested_at = now


def _digest(event: Event) -> bytes:
    return hashlib.blake2b(orjson.dumps(event), digest_size=8).digest()


class RememberingAmplitude(Remembering, AmplitudeServer):
    """Amplitude."""

    def _answer(self, request: Any) -> Reply:
        named = [i for i, e in enumerate(request.events) if e.get("user_id") == REFUSED_USER]
        if not named:
            return super()._answer(request)
        fields = {"events_with_invalid_fields": {"user_id": named}}
        return self._refuse(400, "Request had invalid events", **fields)


class RememberingMixpanel(Remembering, MixpanelServer):
    """Mixpanel."""

    def _answer(self, request: Any) -> Reply:
        reply = super()._answer(request)
        named = [i for i, event in enumerate(request.events) if _is_refused(event)]
        if reply.status != 200 or not named:
            return reply
        failed = [
            {"index": i, "insert_id": self._read_insert_id(request.events[i]), "field": "user"}
            | {"message": "'user' is invalid"}
            for i in named
        ]
        return self._report(reply.ingest - set(named), failed)


def _is_refused(event: Event) -> bool:
    return bool(event["properties"].get("$user_id") == REFUSED_USER)


def open_providers() -> dict[str, Remembering]:
    """Open both, by the names that settings have for them."""
    return {
        "amplitude": RememberingAmplitude(AMPLITUDE_KEY),
        "mixpanel": RememberingMixpanel(MIXPANEL_TOKEN),
    }


def answer(status: int, body: bytes) -> Script:
    """Return a script that takes nothing, and answers this."""
    return Script(Reply(status, body))
