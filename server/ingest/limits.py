"""Rate limits of API keys, shared by the workers of a machine."""

from math import ceil
from typing import NamedTuple

from server.caller import Caller
from server.errors import ResourceExhausted
from server.ingest.buckets import SECOND, BucketTable


class Allowance(NamedTuple):
    """A limit for each window of `seconds`, and how much of it is left to a caller."""

    name: str
    unit: str
    limit: int
    seconds: int
    remaining: int
    seconds_to_full: int


class RateLimiter:
    """Limits events and bytes by a key's own rates, or else the default ones; 0 is no limit."""

    def __init__(self, buckets: BucketTable, *, event_rate: int, byte_rate: int) -> None:
        self._buckets = buckets
        self._default_event_rate = event_rate
        self._default_byte_rate = byte_rate

    def take_events(self, caller: Caller, count: int) -> None:
        """Count what a caller sends, or raise ResourceExhausted and count nothing."""
        if rate := self._event_rate(caller):
            self._take(2 * caller.key_id, rate, count, "events")

    def take_bytes(self, caller: Caller, count: int) -> None:
        """Count what a caller sends, or raise ResourceExhausted and count nothing."""
        if rate := self._byte_rate(caller):
            self._take(2 * caller.key_id + 1, rate, count, "bytes")

    def find_room(self, caller: Caller) -> int | None:
        """Return how many bytes a request may have at this moment; None if any number."""
        if rate := self._byte_rate(caller):
            allowance = self._measure(2 * caller.key_id + 1, rate, "bytes")
            return allowance.remaining if allowance.seconds_to_full else None
        return None

    def refuse_bytes(self, caller: Caller) -> ResourceExhausted:
        """Return the error for a request with more bytes than `find_room` has named."""
        return self._refuse(2 * caller.key_id + 1, self._byte_rate(caller), "bytes")

    def allowances_of(self, caller: Caller) -> list[Allowance]:
        """Return what a caller may still send by each of its limits; empty if it has none."""
        allowances = []
        if rate := self._event_rate(caller):
            allowances.append(self._measure(2 * caller.key_id, rate, "events"))
        if rate := self._byte_rate(caller):
            allowances.append(self._measure(2 * caller.key_id + 1, rate, "bytes"))
        return allowances

    def _event_rate(self, caller: Caller) -> int:
        own = caller.event_rate
        return self._default_event_rate if own is None else own

    def _byte_rate(self, caller: Caller) -> int:
        own = caller.byte_rate
        return self._default_byte_rate if own is None else own

    def _take(self, bucket: int, rate: int, count: int, unit: str) -> None:
        if not self._buckets.take(bucket, count * SECOND // rate):
            raise self._refuse(bucket, rate, unit)

    def _refuse(self, bucket: int, rate: int, unit: str) -> ResourceExhausted:
        seconds = max(1, ceil(self._buckets.seconds_to_full(bucket)))
        return ResourceExhausted(f"rate limit exceeded: {rate} {unit}/s", seconds)

    def _measure(self, bucket: int, rate: int, unit: str) -> Allowance:
        seconds = self._buckets.seconds_to_full(bucket)
        remaining = int(max(0.0, 1 - seconds) * rate)
        return Allowance(unit, unit, rate, 1, remaining, ceil(seconds))
