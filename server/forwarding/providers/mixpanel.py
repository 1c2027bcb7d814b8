"""Mixpanel's Import Events, in strict mode.

https://developer.mixpanel.com/reference/import-events

Events from before 1971 and from more than an hour ahead are sent as they are, and refused. Moving
them would falsify them, and the refusal costs their neighbours nothing. Those that were ahead can
be sent again later.
"""

import gzip
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from server.config import MIXPANEL
from server.forwarding.providers.mapping import (
    VERSIONS,
    Limits,
    StoredEvent,
    fit_id,
    read_event,
)
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

# The limit of three levels, at its strictest: `properties` is the first of them.
_LIMITS = Limits(max_text=255, max_items=254, max_depth=3)
_MAX_ID_BYTES = 255
_DEVICE_PREFIX = "$device:"
# Mixpanel asks for this wait after a 429, a 502 or a 503; full jitter alone could send at once.
_LEAST_WAIT_SECONDS = 2.0
# JSON of many similar events shrinks well at any level, and this one costs least.
_GZIP_LEVEL = 1


class Mixpanel:
    """Sends to the project of `token`."""

    name = MIXPANEL
    # 2,000 events are the documented limit of a request; of its size, sources tell 2 MB and 10 MB.
    max_events = 2000
    max_bytes = 1_900_000

    def __init__(self, token: str, endpoint: str) -> None:
        encoded = b64encode(f"{token}:".encode()).decode()
        self.secrets: tuple[str, ...] = (token, encoded)
        self._url = f"{endpoint}{'&' if '?' in endpoint else '?'}strict=1"
        self._headers = {
            "Authorization": f"Basic {encoded}",
            "Content-Type": "application/json",
            "Content-Encoding": "gzip",
        }

    def encode_event(self, encoded: bytes, version: int) -> bytes:
        """Return an event of the array; raises KeyError for an unknown version."""
        map_properties = VERSIONS[version]
        event = read_event(encoded)
        properties = map_properties(event, _name_properties(event), _LIMITS)
        return orjson.dumps({"event": event.name[: _LIMITS.max_text], "properties": properties})

    def build_request(self, payloads: Sequence[bytes]) -> Request:
        """Return one array, compressed; the same bytes for the same payloads."""
        body = gzip.compress(b"[%s]" % b",".join(payloads), _GZIP_LEVEL, mtime=0)
        return Request(self._url, self._headers, body)

    def decide(self, payloads: Sequence[bytes], answer: Answer | None) -> Decision:
        """Decide what an answer means; a 400 that names events says that it has the others."""
        count = len(payloads)
        if answer is None:
            return retry_all(count)
        report = answer.read_report()
        if answer.status in (429, 502, 503):
            return retry_all(count, max(_LEAST_WAIT_SECONDS, answer.retry_after))
        if answer.status == 200 and report and _is_success(report, count):
            return accept_all(count)
        if answer.status == 400 and report is not None:
            return _decide_refused(report, count, answer.retry_after)
        return decide_by_status(count, answer)


def name_user(user_id: str) -> str:
    """Return the `distinct_id` by which Mixpanel knows a user."""
    return fit_id(user_id, _MAX_ID_BYTES)


def name_device(device_id: str) -> str:
    """Return the `distinct_id` by which Mixpanel knows a device without a user."""
    return f"{_DEVICE_PREFIX}{_fit_device(device_id)}"


def _fit_device(device_id: str) -> str:
    return fit_id(device_id, _MAX_ID_BYTES - len(_DEVICE_PREFIX))


def _name_properties(event: StoredEvent) -> dict[str, Any]:
    """Return what Mixpanel has names of its own for."""
    device_id = _fit_device(event.device_id)
    user_id = name_user(event.user_id) if event.user_id else ""
    own: dict[str, Any] = {
        "time": event.time,
        # What Mixpanel itself makes of the two ids below, frozen here.
        "distinct_id": user_id or f"{_DEVICE_PREFIX}{device_id}",
        "$insert_id": event.insert_id,
        "$device_id": device_id,
    }
    if user_id:
        own["$user_id"] = user_id
    # Without it every user would be at the place of this service.
    own["ip"] = "0"
    if url := event.fields.get("page_url"):
        own["$current_url"] = url
    if referrer := event.fields.get("page_referrer"):
        own["$referrer"] = referrer
    return own


def _is_success(report: Mapping[str, Any], count: int) -> bool:
    return (
        report.get("code") == 200
        and report.get("status") == "OK"
        and report.get("num_records_imported") == count
    )


def _decide_refused(report: Mapping[str, Any], count: int, retry_after: float) -> Decision:
    records = report.get("failed_records")
    if not records:
        return halve(count, read_text(report.get("error")) or "refused (400)")
    named = _read_refused(records, count)
    if named is None:
        return retry_all(count, retry_after)
    rest = frozenset(range(count)) - named.keys()
    if report.get("num_records_imported", len(rest)) != len(rest):
        return Decision(dead=named, retry=dict.fromkeys(rest, retry_after))
    return Decision(dead=named, done=rest)


def _read_refused(records: Any, count: int) -> dict[int, str] | None:
    """Return what a 400 names, and why; None if any of it makes no sense."""
    if not isinstance(records, list):
        return None
    named = {}
    for record in records:
        if not isinstance(record, dict) or not is_index(record.get("index"), count):
            return None
        field, message = read_text(record.get("field")), read_text(record.get("message"))
        named[record["index"]] = message or f"invalid field {field}"
    return named
