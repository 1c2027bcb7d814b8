"""Amplitude's Batch Event Upload.

https://amplitude.com/docs/apis/analytics/batch-event-upload
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson

from productgraph.v1.event_pb2 import Event
from server.config import AMPLITUDE
from server.forwarding.providers.mapping import Limits, fit_id, fit_items, map_event
from server.forwarding.providers.provider import (
    Answer,
    Decision,
    Request,
    accept_all,
    decide_by_status,
    halve,
    is_index,
    read_text,
    retry_all,
)

_LIMITS = Limits(max_text=1024, max_items=None, max_depth=40)
_MAX_ID_BYTES = 1024
# Ids of our clients may be shorter than the five characters that are asked for by default.
_OPTIONS = b'"options":{"min_id_length":1}'
_THROTTLED_SECONDS = 30.0
# Where an answer names events by their indexes: {field: [indexes]}.
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
        self._head = b'{"api_key":%s,%s,"events":[' % (orjson.dumps(api_key), _OPTIONS)

    def encode_event(self, event: Event, version: int) -> bytes:
        """An object of `events`; raises KeyError for an unknown version."""
        return _ENCODERS[version](event)

    def build_request(self, payloads: Sequence[bytes]) -> Request:
        """One batch, not compressed: Amplitude does not document that it would be read."""
        body = b"".join((self._head, b",".join(payloads), b"]}"))
        return Request(self._endpoint, {"Content-Type": "application/json"}, body)

    def decide(self, payloads: Sequence[bytes], answer: Answer | None) -> Decision:
        """What an answer means; a 400 or a 429 is about the events that it names."""
        count = len(payloads)
        if answer is None:
            return retry_all(count)
        report = answer.read_report()
        if answer.status == 429:
            return _decide_throttled(report or {}, payloads, answer.retry_after)
        if answer.status == 200 and report and _is_success(report, count):
            return accept_all(count)
        if answer.status == 400 and report is not None:
            return _decide_refused(report, count, answer.retry_after)
        return decide_by_status(count, answer)


def _encode_event_1(event: Event) -> bytes:
    mapped = map_event(event)
    user = {"user_id": fit_id(mapped.user_id, _MAX_ID_BYTES)} if mapped.user_id else {}
    return orjson.dumps(
        {
            "event_type": mapped.name[: _LIMITS.max_text],
            **user,
            "device_id": fit_id(mapped.device_id, _MAX_ID_BYTES),
            "time": mapped.time,
            # Would have to be the time at which the session began, which no event tells.
            "session_id": -1,
            "insert_id": mapped.insert_id,
            "event_properties": fit_items(mapped.properties.items(), _LIMITS),
        }
    )


_ENCODERS: Mapping[int, Callable[[Event], bytes]] = {1: _encode_event_1}


def _is_success(report: Mapping[str, Any], count: int) -> bool:
    return report.get("code") == 200 and report.get("events_ingested") == count


def _decide_refused(report: Mapping[str, Any], count: int, retry_after: float) -> Decision:
    error, missing = read_text(report.get("error")), read_text(report.get("missing_field"))
    # The text goes on with the key, and must not be repeated.
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
    """What a 400 names, and why; an index may be any text or number."""
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
    """Holds what is named; where nothing is, the whole project is being throttled."""
    held = _find_throttled(report, payloads)
    wait = max(_THROTTLED_SECONDS, retry_after)
    rest = tuple(index for index in range(len(payloads)) if index not in held)
    if not held or not rest:
        return retry_all(len(payloads), wait)
    if retry_after:
        waits = dict.fromkeys(range(len(payloads)), retry_after)
        return Decision(retry=waits | dict.fromkeys(held, wait))
    return Decision(retry=dict.fromkeys(held, wait), resend=(rest,))


def _find_throttled(report: Mapping[str, Any], payloads: Sequence[bytes]) -> set[int]:
    """The events named by index, and those of a named user or device."""
    held = {i for i in _read_list(report.get("throttled_events")) if is_index(i, len(payloads))}
    users = set(_read_list(report.get("throttled_users")))
    devices = set(_read_list(report.get("throttled_devices")))
    if users or devices:
        for index, event in enumerate(map(orjson.loads, payloads)):
            if event.get("user_id") in users or event["device_id"] in devices:
                held.add(index)
    return held


def _read_list(value: Any) -> list[Any]:
    """The items of a list, or the keys of an object; all that is neither text nor number is -1."""
    items = value if isinstance(value, dict | list) else [] if value is None else [value]
    return [item if type(item) in (int, str) else -1 for item in items]
