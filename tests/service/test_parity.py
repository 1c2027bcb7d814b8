"""The same events through both protocols: the same answers, and the same rows."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.struct_pb2 import Value
from grpc_health.v1 import health_pb2, health_pb2_grpc

from productgraph.v1.event_pb2 import Event as EventMessage
from tests.service.test_contract import EXAMPLES
from tests.support.clients import (
    INGEST,
    Outcome,
    Refusal,
    Tenant,
    accepted,
    create_revoked_key,
    encode_request,
    frame,
)
from tests.support.events import Event, to_message
from tests.support.services import Service

MAX_EVENT_BYTES = 102_400
MAX_REQUEST_BYTES = 10 * 1024 * 1024
SERVICE_NAME = "productgraph.v1.EventIngestionService"
FIELDS = EventMessage.DESCRIPTOR.fields
OPTIONAL_FIELDS = [field for field in FIELDS if field.has_presence][1:]


class Twin(Tenant):
    """A tenant that sends everything over both protocols."""

    def send(
        self, events: Sequence[object], messages: Sequence[EventMessage | bytes] | None = None
    ) -> Outcome:
        """Return the answer to events; fail if the protocols differ in it, or in what is stored.

        Over gRPC goes what protobuf's own JSON mapping makes of the events, or the messages given.
        """
        if messages is None:
            messages = [to_message(event) for event in events if isinstance(event, dict)]
        over_http, rows_of_http = self.post_events(events), self.take_rows()
        over_grpc, rows_of_grpc = self.ingest(messages), self.take_rows()
        assert over_grpc == over_http
        assert repr(rows_of_grpc) == repr(rows_of_http)  # which tells 5 from 5.0
        assert len(rows_of_http) == over_http["accepted"]
        return over_http

    def send_one(self, changes: dict[str, object]) -> Outcome:
        """Return the answer to an event with these changes."""
        return self.send([self.make_event(changes)])

    def refuse(self, request: bytes, key: str | None = "") -> tuple[str, str]:
        """Return the status and the text of a gRPC request that is refused as a whole."""
        with pytest.raises(Refusal) as caught:
            self.call(request, key=key)
        return caught.value.code, caught.value.text


@pytest.fixture
def twin(tenant: Tenant) -> Twin:
    """Return a tenant of the test's own."""
    return Twin(**vars(tenant))


def typical_value(field: FieldDescriptor) -> object:
    """Return a value of the field's type, as JSON has it."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return {"text": "x", "number": 1.5, "whole": 2, "list": [True, None, {}], "empty": {}}
    return f"{field.name} é" if field.type == FieldDescriptor.TYPE_STRING else 201


def empty_value(field: FieldDescriptor) -> object:
    """Return the value of the field's type that protobuf takes for none by default."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return {}
    return "" if field.type == FieldDescriptor.TYPE_STRING else 0


@pytest.mark.parametrize("make_value", [typical_value, empty_value])
def test_fields_are_stored_alike_over_both_protocols(
    twin: Twin, make_value: Callable[[FieldDescriptor], object]
) -> None:
    """Each optional field alone, and all of them, are stored the same, and no value as null."""
    values = {field.json_name: make_value(field) for field in OPTIONAL_FIELDS}
    single = [twin.make_event({"event_id": name, name: values[name]}) for name in values]
    assert twin.send([*single, twin.make_event(values)]) == accepted(len(values) + 1)
    twin.ingest([to_message(twin.make_event(values))])
    [row] = twin.read_rows()
    assert {field.json_name: row[field.name] for field in OPTIONAL_FIELDS} == values


def test_unnamed_fields_become_attributes_over_both_protocols(twin: Twin) -> None:
    """A field that the schema does not name is an attribute, wherever HTTP found it."""
    unnamed: Event = {
        "performance.lcp_ms": 12.5,
        "ui.viewport": {"w": 8},
        "org.id": "o",
        "page_path": "",
    }
    inner: Event = {"page.path": "/inner", "kept": 1}
    over_http = twin.make_event({"attributes": inner | {"org.id": "loses"}} | unnamed)
    over_grpc = twin.make_event({"attributes": inner | unnamed})
    assert twin.send([over_http], [to_message(over_grpc)]) == accepted(1)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "\0",
            "a\0b\0",
            "\ufffd",
            "\ufeff",
            "\u2028\u202e",
            "\x7f\x80",
            "\uffff",
            "😀漢é",
        ),
        *(r"\N", r"\.", "\\", "\n\\.\n", "\t\r\n\b\v\f", "NULL", "{}", "'\"`", "%s %(x)s"),
    ],
    ids=ascii,
)
def test_odd_strings_are_stored_alike_over_both_protocols(twin: Twin, text: str) -> None:
    """Odd strings are stored the same, in ids, columns, keys and values."""
    free_form = {text: text, "list": [text], "nested": {text: {text: text}}}
    ids = {"event_id": f"x{text}", "session.id": f"{text}x", "user.id": text}
    sent = {"page.title": text, "metadata": free_form, "attributes": free_form}
    assert twin.send_one({**ids, **sent}) == accepted(1)


@pytest.mark.parametrize("name", ["event_id", "session.id", "user.id", "project_id", "event.type"])
@pytest.mark.parametrize(
    "text",
    [
        *("x" * 255, "x" * 256, "é" * 127, "é" * 128, "x" * 10_000, "\n\x1b'\u202e" * 20),
        *("\0" * 85, "\0" * 86, "\0" * 255, "\0" * 256),
    ],
    ids=lambda text: f"{text[:3]!a} {len(text)}",
)
def test_long_ids_are_judged_alike_over_both_protocols(twin: Twin, name: str, text: str) -> None:
    """Ids around the limit, U+0000 among them, are judged and told of the same."""
    twin.send_one({name: text})


@pytest.mark.parametrize(
    "number",
    [
        *(0, -0.0, 1, -1, 1.0, 0.1, 1e-7, 5e-324, 1.7976931348623157e308, 123456789.125),
        *(2**53, 2**53 - 1, -(2**53), 1e15, 1e16, 1e17, 1e21, 1e22, 1e23, 2.0**64, 2**60),
    ],
    ids=repr,
)
def test_free_form_numbers_are_stored_alike_over_both_protocols(twin: Twin, number: float) -> None:
    """Free-form numbers are stored the same, whatever their text was."""
    free_form = {"x": number, "list": [number]}
    assert twin.send_one({"metadata": free_form, "attributes": free_form}) == accepted(1)


@pytest.mark.parametrize("number", [0, -1, 2**31 - 1, -(2**31), "7", 2**63 - 1, -(2**63)])
def test_integers_are_stored_alike_over_both_protocols(twin: Twin, number: int | str) -> None:
    """Integers are stored the same, zero and the limits among them."""
    sent: dict[str, object] = dict.fromkeys(["event.sequence", "duration_ms"], number)
    if int(number).bit_length() < 32:
        sent["api.status_code"] = number
    assert twin.send_one(sent) == accepted(1)


@pytest.mark.parametrize("name", ["metadata", "attributes"])
@pytest.mark.parametrize("wrap", [lambda x: {"k": x}, lambda x: [x]], ids=["objects", "arrays"])
@pytest.mark.parametrize("leaf", [0, {}, []], ids=repr)
@pytest.mark.parametrize("levels", [31, 32, 33, 34])
def test_nesting_is_measured_alike_over_both_protocols(
    twin: Twin, name: str, wrap: Callable[[object], object], leaf: object, levels: int
) -> None:
    """Nesting is measured the same; 32 levels with the field's own are taken, 33 are not."""
    inner = leaf
    for _ in range(levels - 1 if leaf == 0 else levels - 2):
        inner = wrap(inner)
    events = twin.make_events(3)
    events[1][name] = {"k": inner}
    errors = [error["index"] for error in twin.send(events)["errors"]]
    assert errors == ([] if levels <= 32 else [1])


@pytest.mark.parametrize("levels", [50, 500])
def test_a_very_deep_protobuf_event_is_rejected_alone(twin: Twin, levels: int) -> None:
    """An event too deep for any protobuf parser is rejected alone, as over HTTP."""
    inner: object = 0
    encoded = Value(number_value=0).SerializeToString()
    for _ in range(levels):
        inner = [inner]
        encoded = frame(6, frame(1, encoded))  # Value.list_value, ListValue.values
    entry = frame(1, frame(1, b"k") + frame(2, encoded))  # Struct.fields
    good = twin.make_event()
    message = to_message(good).SerializeToString()
    events = [good, good | {"metadata": {"k": inner}}]
    outcome = twin.send(events, [message, message + frame(33, entry)])
    assert [error["index"] for error in outcome["errors"]] == [1]


TOO_LARGE = f"event: larger than {MAX_EVENT_BYTES} bytes"


@pytest.mark.parametrize("over", range(-2, 3))
@pytest.mark.parametrize("filler", ["x", "é", "\0"], ids=ascii)
@pytest.mark.parametrize("name", ["page.path", "metadata"])
def test_a_protobuf_event_has_at_most_102400_bytes(
    twin: Twin, over: int, filler: str, name: str
) -> None:
    """An event over gRPC may have 102,400 bytes of protobuf, and not one more."""
    padded = pad_event(twin.make_event(), MAX_EVENT_BYTES + over, filler, name)
    outcome = twin.ingest([to_message(padded)])
    assert [e["error"] for e in outcome["errors"]] == ([TOO_LARGE] if over > 0 else [])


def test_size_is_the_only_rule_in_which_the_protocols_differ(twin: Twin) -> None:
    """Over HTTP an event's size is that of its JSON, which may be smaller or larger."""
    numbers = twin.make_event({"metadata": {"v": [1] * 40_000}})
    assert twin.post_events([numbers]) == accepted(1)
    assert [e["error"] for e in twin.ingest([to_message(numbers)])["errors"]] == [TOO_LARGE]
    names = pad_event(twin.make_event(), MAX_EVENT_BYTES)
    assert twin.ingest([to_message(names)]) == accepted(1)
    assert [e["error"] for e in twin.post_events([names])["errors"]] == [TOO_LARGE]


def pad_event(event: Event, size: int, filler: str = "x", name: str = "page.path") -> Event:
    """Return the event with a field that makes it this many bytes of protobuf."""

    def pad(length: int) -> Event:
        count, rest = divmod(length, len(filler.encode()))
        text = filler * count + "x" * rest
        return event | {name: {"k": text} if name == "metadata" else text}

    estimate = size - 200
    padded = pad(estimate + size - to_message(pad(estimate)).ByteSize())
    assert to_message(padded).ByteSize() == size
    return padded


@pytest.mark.parametrize(
    "text",
    [
        *("1970-01-01T00:00:00Z", "1969-12-31T23:59:59.999999999Z", "1969-12-31T23:59:59.000001Z"),
        *("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000000999Z", "0099-12-31T00:00:00Z"),
        *("9999-12-31T23:59:59.999999999Z", "9999-12-31T23:59:59Z", "2024-02-29T12:00:00.5+14:00"),
        *("2024-01-15T10:30:00.000000499Z", "2024-01-15T10:30:00.123456789Z"),
    ],
)
def test_timestamps_are_cut_alike_over_both_protocols(twin: Twin, text: str) -> None:
    """Timestamps are cut to microseconds the same, from the year 1 to the year 9999."""
    assert twin.send_one({"event.timestamp": text}) == accepted(1)


@pytest.mark.parametrize(
    ("text", "seconds", "nanos"),
    [
        ("0000-12-31T23:59:59Z", -62135596801, 0),
        ("9999-12-31T23:59:59-00:01", 253402300859, 0),
        *(("no such nanoseconds", 0, nanos) for nanos in (-1, 10**9, -(2**31), 2**31 - 1)),
    ],
)
def test_bad_timestamps_are_rejected_alike_over_both_protocols(
    twin: Twin, text: str, seconds: int, nanos: int
) -> None:
    """What is no moment of the years 1 to 9999 is rejected the same."""
    message = to_message(twin.make_event())
    message.event_timestamp.seconds, message.event_timestamp.nanos = seconds, nanos
    outcome = twin.send([twin.make_event({"event.timestamp": text})], [message])
    assert outcome["rejected"] == 1


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, None])
def test_protobuf_values_that_json_lacks_become_null(twin: Twin, number: float | None) -> None:
    """A number that is none, and a Value without a kind, become null."""
    free_form = {"x": None, "list": [None]}
    event = twin.make_event({"metadata": free_form, "attributes": free_form})
    message = to_message(event)
    value = Value() if number is None else Value(number_value=number)
    for struct in (message.metadata, message.attributes):
        struct.fields["x"].CopyFrom(value)
        struct.fields["list"].list_value.values[0].CopyFrom(value)
    assert twin.send([event], [message]) == accepted(1)


FAULTS: dict[str, dict[str, object]] = {
    "no id": {"event_id": ""},
    "no project": {"project_id": ""},
    "another project": {"project_id": "proj_demo"},
    "no session": {"session.id": ""},
    "no type": {"event.type": ""},
    "unknown type": {"event.type": "ui.hover"},
    "no timestamp": {"event.timestamp": None},
    "two faults": {"event.timestamp": None, "user.id": "x" * 300},
    "size": {"error.stack": "x" * 200_000},
    "type and size": {"event.type": "x", "error.stack": "x" * 200_000},
    "user and size": {"user.id": "x" * 256, "error.stack": "x" * 200_000},
}


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_event_leaves_neighbours_stored_over_both_protocols(
    twin: Twin, fault: str, position: int
) -> None:
    """A bad event is refused for the same reason wherever it stands, and its neighbours stored."""
    events = twin.make_events(3)
    events[position] |= FAULTS[fault]
    outcome = twin.send(events)
    assert (outcome["accepted"], outcome["rejected"]) == (2, 1)
    assert outcome["errors"][0]["index"] == position


UNREADABLE = {
    "bad UTF-8": (b"\x0a\x01\xff", "event_id: "),
    "cut": (b"\x0a\x05a", "event: "),
    "cut in a key": (b"\x08\x01\x0a", "event: "),
    "no varint": (b"\xff" * 11, "event: "),
    "end without group": (b"\x0c", "event: "),
    "field 0": (b"\x00\x00", "event: "),
}


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("fault", UNREADABLE)
def test_unreadable_bytes_are_rejected_as_one_event(twin: Twin, fault: str, position: int) -> None:
    """Bytes that are no event are rejected as one, and their neighbours are stored."""
    events: list[EventMessage | bytes] = [to_message(event) for event in twin.make_events(3)]
    events[position], beginning = UNREADABLE[fault]
    outcome = twin.ingest(events)
    assert (outcome["accepted"], outcome["rejected"]) == (2, 1)
    assert outcome["errors"][0]["index"] == position
    assert outcome["errors"][0]["error"].startswith(beginning)
    assert len(twin.read_rows()) == 2


def test_a_field_of_a_newer_schema_is_harmless(twin: Twin) -> None:
    """A field that only a newer schema has harms nothing."""
    newer = to_message(twin.make_event()).SerializeToString() + frame(999, b"x")
    assert twin.ingest([newer]) == accepted(1)


def test_an_event_is_known_over_the_other_protocol(twin: Twin) -> None:
    """An event that came over one protocol is known to the other, and its first content stays."""
    events = [twin.make_event({"page.path": "/a"}), twin.make_event()]
    for _ in range(2):
        assert twin.post_events(events) == accepted(2)
        assert twin.ingest(map(to_message, reversed(events))) == accepted(2)
    assert [row["page_path"] for row in twin.read_rows()] == ["/a"]


def test_a_bad_key_is_unauthenticated_over_grpc(twin: Twin) -> None:
    """Whatever is no key is answered UNAUTHENTICATED, with the text that HTTP has."""
    text = twin.post({"events": []}, x_pg_api_key="x").json["error"]
    revoked = create_revoked_key(twin.service, twin.project.id)
    for key in [None, " ", "x", "pgk_", twin.project.key[:-1], twin.project.key + "x", revoked]:
        assert twin.refuse(b"", key) == ("UNAUTHENTICATED", text)


def test_both_protocols_refuse_1001_events_alike(twin: Twin) -> None:
    """A thousand events are a batch, and one more is refused with the text that HTTP has."""
    events = twin.make_events(1001)
    assert twin.send([]) == accepted(0)
    assert twin.send(events[1:]) == accepted(1000)
    text = twin.post({"events": events}).json["error"]
    assert twin.refuse(encode_request(map(to_message, events))) == ("INVALID_ARGUMENT", text)


def test_grpc_takes_messages_of_up_to_10_mb(twin: Twin) -> None:
    """A message of 10 MB is read, compressed or not, and a larger one RESOURCE_EXHAUSTED."""
    padding = {"page.path": "x" * 102_000}
    request = encode_request(to_message(event | padding) for event in twin.make_events(102))
    room = MAX_REQUEST_BYTES - len(request) - len(b"\x0a\x80\x80\x01")  # before an event
    last = to_message(pad_event(twin.make_event({"event_id": "last"}), room))
    request += encode_request([last])
    assert len(request) == MAX_REQUEST_BYTES
    assert twin.call(request) == twin.call(request, gzip=True) == accepted(103)
    assert len(twin.read_rows()) == 103
    assert twin.refuse(request + b"\x0a\x00")[0] == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("content", [b"\x0a", b"\x0a\x05ab", b"\xff" * 12, b"\x08"], ids=repr)
def test_an_unreadable_grpc_request_is_an_invalid_argument(twin: Twin, content: bytes) -> None:
    """Bytes that are no request are answered INVALID_ARGUMENT."""
    assert twin.refuse(content)[0] == "INVALID_ARGUMENT"


def test_a_server_fault_is_internal_over_grpc(twin: Twin) -> None:
    """A fault of the server's is answered INTERNAL with the text that HTTP has."""
    request = encode_request([to_message(twin.make_event())])
    with twin.failing_storage():
        text = twin.post({"events": [twin.make_event()]}).json["error"]
        assert twin.refuse(request) == ("INTERNAL", text)
    assert twin.call(request) == accepted(1)


@pytest.mark.parametrize("name", ["", SERVICE_NAME])
def test_health_over_grpc_needs_no_key(service: Service, name: str) -> None:
    """The standard health service answers for the server and for the service, without a key."""
    with grpc.insecure_channel(service.grpc_target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def run_buf(service: Service, body: str, key: str) -> "subprocess.CompletedProcess[str]":
    """Send JSON through reflection, as grpcurl would."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    buf = shutil.which("buf", path=places)
    assert buf, "buf is not installed"
    command = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--emit-defaults"]
    command += ["--header", f"x-pg-api-key: {key}", "--data", "@-"]
    command.append(f"http://{service.grpc_target}{INGEST}")
    return subprocess.run(
        command, input=body, capture_output=True, text=True, timeout=30, check=False
    )


def test_documented_json_through_reflection_makes_the_same_rows(twin: Twin) -> None:
    """The documented JSON goes through reflection unchanged, and makes the rows of HTTP."""
    bodies = [body.replace("proj_demo", twin.project.id) for body in EXAMPLES.values()]
    for body in bodies:
        ran = run_buf(twin.service, body, twin.project.key)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout) == accepted(len(json.loads(body)["events"]))
    over_grpc = twin.take_rows()
    assert len(over_grpc) == 7
    for body in bodies:
        twin.post(body.encode())
    assert twin.read_rows() == over_grpc
