"""Strict handling, for the tests of clients: all events of a batch are stored, or none."""

import json
from collections.abc import Iterable
from typing import Any, cast

import grpc
import pytest
from google.rpc.status_pb2 import Status

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from tests.service.test_rate_limits import limited
from tests.service.test_rejected import read_kept, wait_for_kept
from tests.support.clients import (
    Answer,
    Outcome,
    Tenant,
    accepted,
    bind_ingest,
    encode_request,
)
from tests.support.events import Event, to_message
from tests.support.services import wait_for

STRICT = "handling=strict"
APPLIED = "preference-applied"
# What clients take in trailers.
TRAILER_BYTES = 4096


def post_strictly(tenant: Tenant, events: Iterable[object]) -> Answer:
    """Post a batch, of which all is to be stored or nothing."""
    return tenant.post({"events": list(events)}, prefer=STRICT)


def call_strictly(tenant: Tenant, events: Iterable[Event]) -> tuple[str, Outcome, dict[str, Any]]:
    """Send a batch over gRPC; return its code, what became of the events, and the trailers."""
    request = encode_request(map(to_message, events))
    metadata = (("x-pg-api-key", tenant.project.key), ("prefer", STRICT))
    with grpc.insecure_channel(tenant.service.grpc_target) as channel:
        call = bind_ingest(channel).future(request, metadata=metadata, timeout=60)
        code = call.code()
        trailers = dict(cast(grpc.Call, call).trailing_metadata())
        if code is grpc.StatusCode.OK:
            return code.name, describe(call.result()), trailers
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (code.value[0], cast(grpc.Call, call).details())
    [detail] = status.details
    response = IngestEventsResponse()
    assert detail.Unpack(response)
    return code.name, describe(response), trailers


def describe(response: IngestEventsResponse) -> Outcome:
    """Return an answer in the form that it has over HTTP."""
    errors = [{"index": error.index, "error": error.error} for error in response.errors]
    return {"accepted": response.accepted, "rejected": response.rejected, "errors": errors}


def make_mixed(tenant: Tenant) -> list[Event]:
    """Return five events, two of which break rules."""
    events = tenant.make_events(5)
    events[0]["event.type"] = "click"
    events[3]["session.id"] = ""
    return events


def test_a_strict_batch_with_an_invalid_event_stores_nothing(tenant: Tenant) -> None:
    """Over both protocols it is refused, with every error that a 202 would have named."""
    events = make_mixed(tenant)
    refused = post_strictly(tenant, events)
    code, outcome, trailers = call_strictly(tenant, events)
    assert tenant.read_rows() == []
    named = tenant.post_events(events)
    assert named["accepted"] == 3
    assert (refused.status, refused.headers[APPLIED]) == (422, STRICT)
    text = "events: 2 of 5 are invalid, nothing was stored"
    assert refused.json == {"error": text} | named | {"accepted": 0}
    assert (code, outcome) == ("INVALID_ARGUMENT", named | {"accepted": 0})
    assert trailers[APPLIED] == STRICT


def test_a_strict_batch_of_valid_events_is_stored(tenant: Tenant) -> None:
    """Over both protocols it is answered as ever, and that the preference was applied."""
    answer = post_strictly(tenant, tenant.make_events(3))
    assert (answer.status, answer.json) == (202, accepted(3))
    assert answer.headers[APPLIED] == STRICT
    code, outcome, trailers = call_strictly(tenant, tenant.make_events(4))
    assert (code, outcome, trailers[APPLIED]) == ("OK", accepted(4), STRICT)
    assert len(tenant.read_rows()) == 4


def test_no_preference_is_applied_unless_asked_for(tenant: Tenant) -> None:
    """Other batches, and lenient ones, are answered without the header."""
    for prefer in (None, "handling=lenient"):
        answer = tenant.post({"events": make_mixed(tenant)}, prefer=prefer)
        assert (answer.status, answer.json["accepted"]) == (202, 3)
        assert APPLIED not in answer.headers


def test_events_of_a_refused_strict_batch_are_not_kept(tenant: Tenant) -> None:
    """What a strict batch is refused for does not come among the rejected events."""
    post_strictly(tenant, make_mixed(tenant))
    call_strictly(tenant, make_mixed(tenant))
    tenant.post_events([tenant.make_event({"session.id": ""})])
    [(_, _, reason, _, _)] = wait_for_kept(tenant, 1)
    assert reason == "session.id: required"
    assert len(read_kept(tenant)) == 1


def test_a_refused_strict_batch_counts_for_the_limits(tenant: Tenant) -> None:
    """Its events are taken from the key's rate, as if they were stored."""
    slow = limited(tenant, event_rate=10)
    events = [*slow.make_events(999), slow.make_event({"event_id": ""})]
    assert post_strictly(slow, events).status == 422
    assert post_strictly(slow, slow.make_events(1)).status == 429


def test_errors_of_a_strict_batch_fit_into_trailers(tenant: Tenant) -> None:
    """Of a thousand errors, the trailers have the first, their number, and no more than 4 KB."""
    events = [tenant.make_event({"event.type": "click"}) for _ in range(1000)]
    code, outcome, trailers = call_strictly(tenant, events)
    assert (code, outcome["rejected"]) == ("INVALID_ARGUMENT", 1000)
    named = post_strictly(tenant, events).json["errors"]
    assert len(named) == 1000
    assert outcome["errors"] == named[: len(outcome["errors"])]
    assert len(outcome["errors"]) > 20
    assert len(trailers["grpc-status-details-bin"]) * 4 / 3 <= TRAILER_BYTES


@pytest.mark.parametrize("size", [1, 300])
def test_large_messages_are_handled_strictly_too(size: int, tenant: Tenant) -> None:
    """A batch that is read in a thread is refused as a whole, like a small one."""
    events = [event | {"page.path": "/" * 1000} for event in tenant.make_events(size)]
    events[-1]["event_id"] = ""
    code, outcome, _ = call_strictly(tenant, events)
    assert (code, outcome["rejected"]) == ("INVALID_ARGUMENT", 1)
    assert post_strictly(tenant, events).status == 422
    assert tenant.read_rows() == []


def test_the_log_has_a_refused_strict_batch(tenant: Tenant) -> None:
    """Its line has the status of the answer, and no warning of rejected events follows."""
    request_id = f"strict-{tenant.project.id}"
    events = make_mixed(tenant)
    tenant.post({"events": events}, prefer=STRICT, x_request_id=request_id)

    def find_lines() -> list[tuple[str, int]]:
        found = [
            line for line in tenant.service.read_log() if tenant.project.id in json.dumps(line)
        ]
        return [(line["message"], line["status"]) for line in found]

    wait_for(find_lines, [("request", 422)])
