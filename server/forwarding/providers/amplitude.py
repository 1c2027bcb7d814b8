"""Amplitude's Batch Event Upload.

https://amplitude.com/docs/apis/analytics/batch-event-upload
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from server.config import AMPLITUDE
from server.forwarding.providers.mapping import (
    VERSIONS,
    Limits,
    fit_id,
    read_event,
)
from server.forwarding.providers.provider import (
    Answer,
    Decision,
    Request,
    Suspicion,
    accept_all,
    decide_by_status,
    halve,
    is_index,
    read_text,
    retry_all,
)

_LIMITS = Limits(max_text=1024, max_items=None, max_depth=40)
_MAX_ID_BYTES = 1024
# Ids of our clients may be shorter than the five characters that Amplitude demands by default.
_OPTIONS = b'"options":{"min_id_length":1}'
_THROTTLED_SECONDS = 30.0
# A daily quota may be free again at any hour of the user's day.
_QUOTA_SECONDS = 3600.0
QUOTA_REASON = "over the daily quota of its user or device"
# The members of an answer that name events by their indexes: {field: [indexes]}.
_NAMED_BY_FIELD = {
    "events_with_missing_fields": "missing field",
    "events_with_invalid_fields": "invalid field",
    "events_with_invalid_id_lengths": "invalid length of",
}


class Amplitude:
    """Sends to the project of `api_key`."""

    name = AMPLITUDE
    # 2,000 events and 20 MB are the documented limits of a request.
    max_events = 2000
    max_bytes = 19_000_000

    def __init__(self, api_key: str, endpoint: str) -> None:
        self._endpoint = endpoint
        self.secrets: tuple[str, ...] = (api_key,)
        self._head = b'{"api_key":%s,%s,"events":[' % (orjson.dumps(api_key), _OPTIONS)

    def encode_event(self, encoded: bytes, version: int) -> bytes:
        """Return an object of `events`; raises KeyError for an unknown version."""
        map_properties = VERSIONS[version]
        event = read_event(encoded)
        user = {"user_id": name_user(event.user_id)} if event.user_id else {}
        return orjson.dumps(
            {
                "event_type": event.name[: _LIMITS.max_text],
                **user,
                "device_id": fit_id(event.device_id, _MAX_ID_BYTES),
                "time": event.time,
                # Amplitude wants the time at which the session began, which no event tells.
                "session_id": -1,
                "insert_id": event.insert_id,
                "event_properties": map_properties(event, {}, _LIMITS),
            }
        )

    def build_request(self, payloads: Sequence[bytes]) -> Request:
        """Return one batch, not compressed: Amplitude documents no compression."""
        body = b"".join((self._head, b",".join(payloads), b"]}"))
        return Request(self._endpoint, {"Content-Type": "application/json"}, body)

    def decide(self, payloads: Sequence[bytes], answer: Answer | None) -> Decision:
        """Decide what an answer means; a 400 or a 429 is about the events that it names."""
        count = len(payloads)
        if answer is None:
            return retry_all(count)
        report = answer.read_report()
        if answer.status == 429:
            return _decide_throttled(report or {}, payloads, answer.retry_after)
        if answer.status == 200 and report is not None:
            return _decide_ingested(report, count, answer.retry_after)
        if answer.status == 400 and report is not None:
            return _decide_refused(report, count, answer.retry_after)
        return decide_by_status(count, answer)


def name_user(user_id: str) -> str:
    """Return the `user_id` by which Amplitude knows a user."""
    return fit_id(user_id, _MAX_ID_BYTES)


def _decide_ingested(report: Mapping[str, Any], count: int, retry_after: float) -> Decision:
    ingested = report.get("events_ingested") if report.get("code") == 200 else None
    if type(ingested) is int and ingested == count:
        return accept_all(count)
    if type(ingested) is int and 0 <= ingested < count:
        reason = "not ingested, without a reason (200)"
        return Decision(suspicion=Suspicion(reason, is_refusal=False))
    return retry_all(count, retry_after)


def _decide_refused(report: Mapping[str, Any], count: int, retry_after: float) -> Decision:
    error, missing = read_text(report.get("error")), read_text(report.get("missing_field"))
    # The text goes on with the key, which must not be repeated.
    if error.lower().startswith("invalid api key") or missing == "api_key":
        return Decision(stop="the API key was refused (400)")
    named = dict(_read_refused(report))
    if not all(is_index(index, count) for index in named):
        return retry_all(count, retry_after)
    if not named:
        return halve(count, f"missing field {missing}" if missing else error or "refused (400)")
    rest = tuple(index for index in range(count) if index not in named)
    return Decision(dead=named, resend=(rest,) if rest else ())


def _read_refused(report: Mapping[str, Any]) -> Iterable[tuple[Any, str]]:
    """Yield what a 400 names, and why; an index may be any text or number."""
    for key, problem in _NAMED_BY_FIELD.items():
        fields = report.get(key)
        for field, indexes in fields.items() if isinstance(fields, dict) else ():
            for index in _read_list(indexes):
                yield index, f"{problem} {read_text(field)}"
    for index in _read_list(report.get("silenced_events")):
        yield index, "silenced device"


def _decide_throttled(
    report: Mapping[str, Any], payloads: Sequence[bytes], retry_after: float
) -> Decision:
    """Hold the events that are named; if none is, the whole project is being throttled."""
    every = range(len(payloads))
    over_quota = _find_people(
        report.get("exceeded_daily_quota_users"),
        report.get("exceeded_daily_quota_devices"),
        payloads,
    )
    held = {i for i in _read_list(report.get("throttled_events")) if is_index(i, len(payloads))}
    held |= _find_people(report.get("throttled_users"), report.get("throttled_devices"), payloads)
    wait = max(_THROTTLED_SECONDS, retry_after)
    waits = dict.fromkeys(held, wait) | dict.fromkeys(over_quota, _QUOTA_SECONDS)
    reasons = dict.fromkeys(over_quota, QUOTA_REASON)
    rest = tuple(index for index in every if index not in waits)
    if not waits:
        return retry_all(len(payloads), wait)
    if retry_after or not rest:
        return Decision(retry=dict.fromkeys(rest, retry_after) | waits, retry_reasons=reasons)
    return Decision(retry=waits, retry_reasons=reasons, resend=(rest,))


def _find_people(users: Any, devices: Any, payloads: Sequence[bytes]) -> set[int]:
    """Return the events of the users and devices that an answer names."""
    user_ids, device_ids = set(_read_list(users)), set(_read_list(devices))
    if not user_ids and not device_ids:
        return set()
    return {
        index
        for index, event in enumerate(map(orjson.loads, payloads))
        if event.get("user_id") in user_ids or event["device_id"] in device_ids
    }


def _read_list(value: Any) -> list[Any]:
    """Return the items of a list or the keys of an object; -1 for all but text and integers."""
    items = value if isinstance(value, dict | list) else [] if value is None else [value]
    return [item if type(item) in (int, str) else -1 for item in items]
