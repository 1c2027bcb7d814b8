"""Whatever is sent: free-form JSON comes back as it was, and no input is the server's fault."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.clients import Refusal, Tenant, accepted, encode_request, open_tenant
from tests.support.events import JSON, TEXT, to_message
from tests.support.services import Service

bounded = settings(max_examples=150, deadline=None)

NAMES = st.sampled_from([field.json_name for field in to_message({}).DESCRIPTOR.fields])


@pytest.fixture(scope="module")
def tenant(service: Service) -> Iterator[Tenant]:
    """One tenant for all examples."""
    with open_tenant(service) as tenant:
        yield tenant


@pytest.fixture(autouse=True)
def survival(tenant: Tenant) -> Iterator[None]:
    """After each test the same worker still stores events."""
    before = [worker.pid for worker in tenant.service.find_workers()]
    yield
    assert tenant.post_events([tenant.make_event()]) == accepted(1)
    assert [worker.pid for worker in tenant.service.find_workers()] == before


def stored_form(value: Any) -> Any:
    """Return what becomes of a free-form value."""
    match value:
        case str():
            return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in value)
        case dict():
            return {stored_form(key): stored_form(inner) for key, inner in value.items()}
        case list():
            return [stored_form(inner) for inner in value]
        case int() if not isinstance(value, bool):
            return float(value) if is_exact(value) else str(value)
        case _:
            return value


def is_exact(number: int) -> bool:
    """Whether a double holds the integer."""
    try:
        return int(float(number)) == number
    except OverflowError:
        return False


def as_doubles(value: object) -> Any:
    """JSON whose numbers are all read as doubles, however many digits they are stored with."""
    return json.loads(json.dumps(value), parse_int=float)


@bounded
@given(metadata=st.dictionaries(TEXT, JSON, max_size=4))
@example(metadata={"ids": [2**53 + 1, 2**63 - 1, 2**64 + 1, 10**400], "cut": "\ud83d", "\0": "\0"})
def test_any_free_form_json_is_stored_as_sent(tenant: Tenant, metadata: dict[str, Any]) -> None:
    """Free-form JSON is stored as it was sent, under metadata and under a name of its own."""
    event = tenant.make_event({"metadata": metadata, "custom": [metadata]})
    tenant.take_rows()
    assert tenant.post_events([event]) == accepted(1)
    [row] = tenant.read_rows()
    # Two surrogates beside each other are one character once they have been through JSON.
    expected = stored_form(json.loads(json.dumps(metadata)))
    assert as_doubles(row["metadata"]) == expected
    assert as_doubles(row["attributes"]) == {"custom": [expected]}


@bounded
@given(body=st.binary(max_size=400))
@example(body=b"[" * 200_000)
@example(body=b'{"events":' + b"[" * 200_000)
@example(body=b'{"events":[{"a":' * 20_000)
@example(body=b'{"events":["\\ud83d",' + b"[" * 200_000)
@example(body=b"9" * 100_000)
def test_any_bytes_that_are_no_batch_are_answered_400(tenant: Tenant, body: bytes) -> None:
    """Bytes that are no batch are answered 400, declared as compressed or not."""
    for encoding in ("identity", "gzip"):
        assert tenant.post(body, content_encoding=encoding).status == 400


@bounded
@given(document=JSON)
def test_any_json_that_is_no_batch_is_answered_400(tenant: Tenant, document: object) -> None:
    """JSON that is no batch is answered 400."""
    assert tenant.post(document).status == 400
    if not isinstance(document, list):
        assert tenant.post({"events": document}).status == 400


@bounded
@given(events=st.lists(JSON | st.dictionaries(NAMES, JSON), max_size=4))
def test_events_of_any_shape_harm_no_neighbour(tenant: Tenant, events: list[object]) -> None:
    """Events of any shape are rejected one by one, and a good one behind them is accepted."""
    outcome = tenant.post_events([*events, tenant.make_event()])
    assert (outcome["accepted"], outcome["rejected"]) == (1, len(events))
    assert [error["index"] for error in outcome["errors"]] == list(range(len(events)))


@bounded
@given(name=NAMES, value=JSON)
@example(name="event.type", value="\ud83d" * 100)
@example(name="event.sequence", value="9" * 10_000)
@example(name="duration_ms", value=1e308)
@example(name="duration_ms", value="1e999999999")
@example(name="event.timestamp", value="9" * 10_000)
def test_any_odd_value_is_accepted_or_named(tenant: Tenant, name: str, value: object) -> None:
    """An event with one odd value is accepted or told of that field, and hurts no neighbour."""
    events = tenant.make_events(3)
    events[1][name] = value
    for error in tenant.post_events(events)["errors"]:
        assert error["index"] == 1
        assert error["error"].startswith(f"{name}: ")
        assert error["error"].isprintable()
        assert len(error["error"]) < 400  # as long as a list of all types


def damage(good: bytes, junk: bytes, data: st.DataObject) -> bytes:
    """Return the bytes with some of them replaced by others."""
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(start + 3, len(good))) | st.just(len(good)))
    return good[:start] + junk + good[end:]


@bounded
@given(data=st.data(), junk=st.binary(max_size=3))
def test_any_damaged_body_is_answered_202_or_400(
    tenant: Tenant, data: st.DataObject, junk: bytes
) -> None:
    """A body with some bytes changed, cut out or put in is answered 202 or 400."""
    body = json.dumps({"events": tenant.make_events(2)}).encode()
    assert tenant.post(damage(body, junk, data)).status in (202, 400)


@bounded
@given(data=st.data(), junk=st.binary(max_size=3))
def test_any_damaged_grpc_request_is_read_or_refused(
    tenant: Tenant, data: st.DataObject, junk: bytes
) -> None:
    """A gRPC request with some bytes changed, cut out or put in is read or refused."""
    good = encode_request(map(to_message, tenant.make_events(2)))
    assert call_for_code(tenant, damage(good, junk, data)) in ("OK", "INVALID_ARGUMENT")


@bounded
@given(content=st.binary(max_size=200))
def test_any_bytes_over_grpc_are_refused_or_rejected(tenant: Tenant, content: bytes) -> None:
    """Bytes that are no gRPC request are refused, and bytes that are no event rejected."""
    assert call_for_code(tenant, content) in ("OK", "INVALID_ARGUMENT")
    assert tenant.ingest([content])["rejected"] == 1


def call_for_code(tenant: Tenant, request: bytes) -> str:
    """Return the status of a gRPC request."""
    try:
        tenant.call(request)
    except Refusal as refusal:
        return refusal.code
    return "OK"
