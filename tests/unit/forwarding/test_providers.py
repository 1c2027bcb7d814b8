"""What providers are sent never changes, keeps their limits, and their answers lose no event."""

import gzip
import hashlib
import http.client
import json
import re
import socket
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from productgraph.v1.event_pb2 import Event
from server.events.free_form import fill_struct
from server.events.json_codec import JsonCodec
from server.events.parsed import ParsedEvent
from server.events.schema import EVENT_SCHEMA
from server.events.timestamps import END_SECOND, FIRST_SECOND
from server.forwarding.providers.amplitude import QUOTA_REASON, Amplitude
from server.forwarding.providers.mapping import REFUSED_IDS, make_insert_id
from server.forwarding.providers.mixpanel import Mixpanel
from server.forwarding.providers.provider import (
    CURRENT_MAPPING_VERSION,
    Answer,
    Decision,
    Provider,
    Request,
    Suspicion,
)
from tests.support.provider_servers import (
    HTML,
    AmplitudeServer,
    Fault,
    MixpanelServer,
    ProviderServer,
    Reply,
    Script,
    measure_depth,
)
from tests.support.services import wait_until

SECRET = "s3cret"
MIXPANEL_URL = "https://api.mixpanel.com/import"
AMPLITUDE = Amplitude(SECRET, "https://api2.amplitude.com/batch")
MIXPANEL = Mixpanel(SECRET, MIXPANEL_URL)
PROVIDERS: list[Provider] = [AMPLITUDE, MIXPANEL]
both = pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)

REQUIRED = {
    "event_id": "evt_1",
    "project_id": "proj_demo",
    "session.id": "sess_abc123",
    "event.type": "custom",
    "event.timestamp": "2024-01-15T10:30:00Z",
}


def make_event(**fields: Any) -> Event:
    """Return an event as it is stored, from its documented names with `__` for a dot."""
    sent = {name.replace("__", "."): value for name, value in fields.items()}
    return parse({**REQUIRED, **sent})


def parse(sent: dict[str, Any]) -> Event:
    """Return an event as it is stored."""
    [parsed] = JsonCodec(EVENT_SCHEMA).parse_batch(json.dumps({"events": [sent]}).encode()).events
    assert isinstance(parsed, ParsedEvent)
    return parsed.event


def encode_bytes(provider: Provider, event: Event, version: int = CURRENT_MAPPING_VERSION) -> bytes:
    """Return the bytes that a provider is sent for an event."""
    return provider.encode_event(event.SerializeToString(), version)


def encode(provider: Provider, event: Event) -> dict[str, Any]:
    """Return what a provider is sent for an event."""
    payload: dict[str, Any] = json.loads(encode_bytes(provider, event))
    return payload


def encode_properties(provider: Provider, event: Event) -> dict[str, Any]:
    """Return the properties that a provider is sent for an event."""
    payload = encode(provider, event)
    properties: dict[str, Any] = payload.get("event_properties") or payload["properties"]
    return properties


VERSIONS = range(1, CURRENT_MAPPING_VERSION + 1)

SHORT_NAMES = {
    "event_type": "event.type",
    "session_id": "session.id",
    "project_id": "project_id",
    "sequence": "event.sequence",
    "duration_ms": "duration_ms",
    **{f"page_{name}": f"page.{name}" for name in ("path", "title", "url", "referrer")},
    **{f"component_{name}": f"ui.component.{name}" for name in ("name", "path", "type")},
    "action": "ui.action",
    "element": "ui.element",
    "element_text": "ui.element.text",
    **{f"state_{name}": f"ui.state.{name}" for name in ("key", "before", "after")},
    "journey_id": "gen_ai.journey.id",
    "journey_step_id": "gen_ai.journey.step.id",
    "journey_step_name": "gen_ai.journey.step.name",
    **{f"api_{name}": f"api.{name}" for name in ("method", "path", "status_code", "duration_ms")},
    **{f"error_{name}": f"error.{name}" for name in ("type", "message", "stack")},
}


# The examples of the documentation: id, type, insert id, second, and the other fields.
EXAMPLES: list[tuple[str, str, str, int, dict[str, str]]] = [
    (
        *("evt_001", "page.view", "214cbf75-e382-5543-b9cf-9f4c84ecaa25", 0),
        {"page.path": "/products", "page.title": "Products"},
    ),
    (
        *("evt_002", "ui.click", "facdf659-15bf-5e79-8e51-902bcaa6d8d1", 15),
        {"page.path": "/products", "ui.component.name": "AddToCartButton"}
        | {"ui.component.path": "ProductPage/ProductCard/AddToCartButton", "ui.action": "click"}
        | {"ui.element.text": "Add to Cart"},
    ),
    (
        *("evt_003", "state.change", "3ef0aa2e-8c55-5f55-861e-bb4f305ea2cb", 16),
        {"page.path": "/products", "ui.state.key": "cart.items", "ui.state.before": "[]"}
        | {"ui.state.after": '[{"id":"prod_123","qty":1}]'},
    ),
    (
        *("evt_004", "journey.step", "9230abfd-9fe4-5186-a8d3-3bd99d69e816", 60),
        {"page.path": "/checkout", "gen_ai.journey.id": "checkout_flow"}
        | {"gen_ai.journey.step.id": "step_payment"}
        | {"gen_ai.journey.step.name": "Enter Payment Details"},
    ),
    (
        *("evt_005", "page.view", "9361ba05-5511-5f74-9a91-e970149b4695", 0),
        {"page.path": "/checkout"},
    ),
    (
        *("evt_006", "ui.input", "2ad5af32-bfc0-5578-b98f-d233d9dcf942", 30),
        {"page.path": "/checkout", "ui.component.name": "EmailInput", "ui.action": "input"},
    ),
    (
        *("evt_007", "ui.submit", "1b11a92f-f594-5072-a2af-e3d8528a063d", 60),
        {"page.path": "/checkout", "ui.component.name": "CheckoutForm", "ui.action": "submit"},
    ),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example[0])
def test_payloads_of_a_version_never_change(
    example: tuple[str, str, str, int, dict[str, str]], version: int
) -> None:
    """The mapping yields these bytes, in this and in every later release."""
    event_id, event_type, insert_id, second, sent = example
    instant = f"2024-01-15T10:{30 + second // 60}:{second % 60:02}Z"
    fields = {"event_id": event_id, "event.type": event_type, "event.timestamp": instant}
    event = parse(REQUIRED | fields | sent)
    names = {wire: name for name, wire in SHORT_NAMES.items()}
    common = f'"project_id":"proj_demo","session_id":"sess_abc123","event_type":"{event_type}"'
    common += "".join(f',"{names[wire]}":{json.dumps(value)}' for wire, value in sent.items())
    now = 1_705_314_600_000 + second * 1000
    assert encode_bytes(AMPLITUDE, event, version).decode() == (
        f'{{"event_type":"{event_type}","device_id":"sess_abc123","time":{now},"session_id":-1,'
        f'"insert_id":"{insert_id}","event_properties":{{{common}}}}}'
    )
    assert encode_bytes(MIXPANEL, event, version).decode() == (
        f'{{"event":"{event_type}","properties":{{"time":{now},'
        f'"distinct_id":"$device:sess_abc123","$insert_id":"{insert_id}",'
        f'"$device_id":"sess_abc123","ip":"0",{common}}}}}'
    )


def test_the_payload_of_everything_never_changes() -> None:
    """So do the parts that no example of the documentation has."""
    sent = {"event.timestamp": "2024-01-15T10:30:00.123999Z", "event.name": "Päge ✓"}
    sent |= {
        "user.id": "null",
        "user.anonymous_id": "a-1",
        "page.url": "https://x.test/" + "y" * 300,
    }
    loose = {"performance.lcp_ms": 12.5, "org": {"b": [1, {"c": {"d": 2}}]}, "event.sequence": 0}
    metadata = {"metadata": {"z": None, "a": True, "n": 9007199254740993}}
    event = parse({**REQUIRED, **sent, **loose, **metadata})
    for version in VERSIONS:  # which differ only in what version 1 leaves out
        payloads = [encode_bytes(provider, event, version) for provider in PROVIDERS]
        digests = [hashlib.sha256(payload).hexdigest()[:16] for payload in payloads]
        assert digests == ["84571e061b9c1d70", "aaab0a9c5a5330d1"]


@given(st.text(), st.text(), st.integers(FIRST_SECOND, END_SECOND - 1), st.integers(0, 999_999))
def test_insert_ids_are_uuids_of_project_id_and_time(
    project_id: str, event_id: str, second: int, microsecond: int
) -> None:
    """The insert id is the UUID, of version 5, of what identifies an event."""
    time = Timestamp(seconds=second, nanos=1000 * microsecond + 999)
    event = Event(project_id=project_id, event_id=event_id, event_timestamp=time)
    name = f"{project_id}\0{event_id}\0{second * 1_000_000 + microsecond}"
    namespace = uuid.UUID("6f1b6c0e-6a1d-4d0b-9d0c-3c5b0f2f7a51")
    assert make_insert_id(event) == str(uuid.uuid5(namespace, name))


@both
def test_every_mapping_version_is_known(provider: Provider) -> None:
    """Every version up to the current one is known, and none after it."""
    for version in VERSIONS:
        assert json.loads(encode_bytes(provider, make_event(), version))
    with pytest.raises(KeyError):
        encode_bytes(provider, make_event(), CURRENT_MAPPING_VERSION + 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, "custom"),
        ("", "custom"),
        ("  ", "custom"),
        ("Checkout started", "Checkout started"),
        ("custom", "custom"),
        ("$merge", "merge"),
        (" $$identify ", "identify"),
        ("$", "custom"),
        ("é" * 255, "é" * 255),
    ],
)
def test_event_names_avoid_the_providers_commands(name: str | None, expected: str) -> None:
    """An event has its own name, else its type's; no name is one of a provider's commands."""
    event = make_event(event__name=name)
    assert (encode(AMPLITUDE, event)["event_type"], encode(MIXPANEL, event)["event"]) == (
        expected,
        expected,
    )


def read_ids(event: Event) -> list[tuple[str | None, str]]:
    """Return the user and the device that each provider is told."""
    sent, properties = encode(AMPLITUDE, event), encode_properties(MIXPANEL, event)
    user, device = properties.get("$user_id"), properties["$device_id"]
    assert properties["distinct_id"] == (user or f"$device:{device}")
    return [(sent.get("user_id"), sent["device_id"]), (user, device)]


ODD_IDS: list[Any] = ["", " ", 7, None, {}, []]


@pytest.mark.parametrize(
    ("fields", "user", "device"),
    [
        ({}, None, "sess_abc123"),
        ({"user.id": ""}, None, "sess_abc123"),
        ({"user.id": "u"}, "u", "sess_abc123"),
        ({"user.anonymous_id": "anon-7"}, None, "anon-7"),
        ({"user.anonymous_id": "anon-7", "user.id": "u"}, "u", "anon-7"),
        *(({"user.anonymous_id": odd}, None, "sess_abc123") for odd in ODD_IDS),
    ],
    ids=repr,
)
def test_user_and_device_come_from_the_documented_fields(
    fields: dict[str, Any], user: str | None, device: str
) -> None:
    """The user is `user.id`, the device `user.anonymous_id` or else the session."""
    assert read_ids(make_event(**fields)) == [(user, device)] * 2


@pytest.mark.parametrize("refused", sorted(REFUSED_IDS - {""}))
@pytest.mark.parametrize("change", [str, str.upper, " {} ".format], ids=["as is", "upper", "blank"])
def test_accidental_ids_are_sent_as_digests(refused: str, change: Callable[[str], str]) -> None:
    """An id that providers take for an accident is sent as its digest."""
    value = change(refused)
    digest = hashlib.sha256(value.encode()).hexdigest()
    event = make_event(**{"user.id": value, "user.anonymous_id": value})
    assert read_ids(event) == [(digest, digest)] * 2
    assert read_ids(make_event(session__id=value)) == [(None, digest)] * 2


def test_ids_too_long_are_sent_as_digests() -> None:
    """An id longer than a provider takes is sent as its digest, so that it stays an id."""
    fits, over, enormous = "a" * 247, "é" * 124, "b" * 1025
    for value, expected in (
        (fits, (fits, fits)),
        (over, (over, hashlib.sha256(over.encode()).hexdigest())),
        (enormous, (hashlib.sha256(enormous.encode()).hexdigest(),) * 2),
    ):
        ids = read_ids(make_event(**{"user.anonymous_id": value}))
        assert tuple(device for _, device in ids) == expected


def test_every_field_is_a_property_by_short_name() -> None:
    """Every documented field is a property under its short name, empty and zero ones too."""
    for text, number in (("text", 7), ("", 0)):
        values = {
            wire: REQUIRED.get(wire, number if re.search("_ms|status|sequence", wire) else text)
            for wire in SHORT_NAMES.values()
        }
        expected = {name: values[wire] for name, wire in SHORT_NAMES.items()}
        assert encode_properties(AMPLITUDE, make_event(**values)) == expected
        links = {"$current_url": text, "$referrer": text} if text else {}
        sent = encode_properties(MIXPANEL, make_event(**values)).items()
        assert expected.items() | links.items() <= sent
        assert ("$current_url" in dict(sent)) is bool(text)


@both
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"performance.lcp_ms": 1.5}, {"performance_lcp_ms": 1.5}),
        ({"a.b.c": {"d.e": [1, None]}}, {"a_b_c": {"d.e": [1, None]}}),
        ({"metadata": {"a.b": 1}}, {"a.b": 1}),
        ({"page.path": "/", "metadata": {"page_path": "x"}}, {"page_path": "/"}),
        ({"page_path": "sent loose"}, {"page_path": "sent loose"}),
        ({"page.path": "/", "page_path": "sent loose"}, {"page_path": "/"}),
        ({"session_id": "sent loose"}, {"session_id": "sess_abc123"}),
        ({"a.b": 1, "a_b": 2, "metadata": {"a_b": 3, "c": 4}}, {"a_b": 1, "c": 4}),
        ({"user.anonymous_id": "anon-7"}, {"user_anonymous_id": "anon-7"}),
    ],
    ids=repr,
)
def test_attributes_and_metadata_never_overwrite_each_other(
    provider: Provider, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Attributes have underscores for dots, metadata keeps its keys, and neither overwrites."""
    properties = encode_properties(provider, make_event(**fields))
    assert {name: properties.get(name) for name in expected} == expected


RESERVED = ["ip", "token", "time", "distinct_id", "$insert_id", "$user_id", "$", "mp_lib", "mp_"]


@both
@pytest.mark.parametrize("name", RESERVED)
def test_no_key_can_impersonate_user_or_project(provider: Provider, name: str) -> None:
    """No client can pose as another user, place or project by the names of its keys."""
    for fields in ({"metadata": {name: "forged"}}, {name: "forged"}, {"mp.lib": "forged"}):
        event = make_event(**fields)
        assert b"forged" not in encode_bytes(provider, event, 1)
        assert encode_properties(provider, event).get(name) != "forged"
        assert [*encode_properties(provider, event).values()].count("forged") == 1


@both
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"metadata": {"time": 1}}, {"metadata_time": 1}),
        ({"metadata": {"$set": 1, "mp_x": 2}}, {"metadata_$set": 1, "metadata_mp_x": 2}),
        ({"time": 1, "metadata": {"time": 2}}, {"attributes_time": 1, "metadata_time": 2}),
        ({"ui.action": "a", "metadata": {"action": 1}}, {"action": "a", "metadata_action": 1}),
        ({"page.path": "/", "page_path": 1}, {"page_path": "/", "attributes_page_path": 1}),
        ({"a.b": 1, "a_b": 2}, {"a_b": 1, "attributes_a_b": 2}),
        (
            {"metadata": {"time": 1, "metadata_time": 2, "metadata_time_2": 3}},
            {"metadata_time": 2, "metadata_time_2": 3, "metadata_time_3": 1},
        ),
        (
            {"metadata_ip": 0, "metadata": {"ip": 1, "metadata_ip": 2}},
            {"metadata_ip": 0, "metadata_ip_2": 1, "metadata_metadata_ip": 2},
        ),
    ],
    ids=repr,
)
def test_displaced_properties_are_kept_under_free_names(
    provider: Provider, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    """What has a reserved name, or one that is taken, is kept under one that is free."""
    properties = encode_properties(provider, make_event(**fields))
    assert {name: properties.get(name) for name in expected} == expected


@both
def test_names_that_are_cut_alike_stay_apart(provider: Provider) -> None:
    """Keys that differ only where a provider cuts them are numbered, at any depth."""
    keys = {"k" * 1024 + end: end for end in "abc"}
    properties = encode_properties(provider, make_event(metadata=keys | {"deep": keys}))
    for names in (properties, properties["deep"]):
        assert {"a", "b", "c"} <= {value for value in names.values() if isinstance(value, str)}


@given(
    metadata=st.dictionaries(
        st.sampled_from(["time", "metadata_time", "action", "$a", "x"]), st.integers(1, 9)
    )
)
def test_no_metadata_vanishes_from_payloads(metadata: dict[str, int]) -> None:
    """Each value of metadata is a property, whatever its key, in any process by the same name."""
    event = make_event(ui__action="click", metadata=metadata)
    for provider in PROVIDERS:
        properties = encode_properties(provider, event)
        numbers = [
            value for name, value in properties.items() if name != "time" and type(value) is int
        ]
        assert sorted(numbers) == sorted(metadata.values())
        turned = make_event(ui__action="click", metadata=turn(metadata))
        assert encode_properties(provider, turned) == properties


@pytest.mark.parametrize(
    ("seconds", "nanos", "expected"),
    [
        (1_705_314_600, 123_999_000, 1_705_314_600_123),
        (0, 0, 0),
        (-1, 999_000_000, -1),
        (FIRST_SECOND, 0, FIRST_SECOND * 1000),
        (END_SECOND - 1, 999_999_999, END_SECOND * 1000 - 1),
    ],
)
def test_event_times_are_sent_in_whole_milliseconds(
    seconds: int, nanos: int, expected: int
) -> None:
    """Times are whole milliseconds, sent as they are even where a provider refuses them."""
    event = make_event()
    event.event_timestamp.CopyFrom(Timestamp(seconds=seconds, nanos=nanos))
    sent = encode(AMPLITUDE, event)
    assert (sent["time"], sent["session_id"]) == (expected, -1)
    assert encode_properties(MIXPANEL, event)["time"] == expected


def test_insert_ids_depend_only_on_event_identity() -> None:
    """Project, event id and microsecond make the insert id, and nothing else does."""
    event = make_event()
    others = [
        make_event(project_id="proj_demo2"),
        make_event(event_id="evt_2"),
        make_event(event__timestamp="2024-01-15T10:30:00.000001Z"),
        make_event(event_id="demo\x1fevt_1", project_id="proj_"),
    ]
    same = make_event(event__name="x", user__id="u", session__id="s", metadata={"insert_id": "1"})
    ids = [encode(AMPLITUDE, e)["insert_id"] for e in (event, same, *others)]
    assert ids == [encode_properties(MIXPANEL, e)["$insert_id"] for e in (event, same, *others)]
    assert (ids[0] == ids[1], len(set(ids))) == (True, 5)
    assert all(re.fullmatch("[a-f0-9-]{36}", insert_id) for insert_id in ids)


def nest(levels: int) -> dict[str, Any]:
    """Return an object of this many levels, itself counted."""
    return {"k": nest(levels - 1)} if levels > 1 else {}


WIDE = {f"{number:03}": number for number in range(300)}


@pytest.mark.parametrize(
    ("sent", "amplitude", "mixpanel"),
    [
        ([1.5, 0, -7, 1e300, True, None, ""], ..., ...),
        ("x" * 1025, "x" * 1024, "x" * 255),
        (["é" * 300, {"k": "é" * 300}], ..., ["é" * 255, {"k": "é" * 255}]),
        ({"k" * 300: 1}, ..., {"k" * 255: 1}),
        (WIDE, ..., dict(list(WIDE.items())[:254])),
        (list(range(300)), ..., list(range(254))),
        ({"b": {"y": 1, "x": "text"}}, ..., ...),
        ({"b": {"y": 1, "x": [2]}}, ..., {"b": {"y": 1, "x": "[2]"}}),
        ([[{"y": 1, "x": [2]}]], ..., [['{"x":[2],"y":1}']]),
        ([[["x" * 300]]], ..., [['["' + "x" * 253]]),
        (nest(31), ..., {"k": {"k": '{"k":' * 28 + "{}" + "}" * 28}}),
    ],
    ids=lambda value: "" if value is ... else repr(value)[:20],
)
def test_large_values_are_cut_to_provider_limits(sent: Any, amplitude: Any, mixpanel: Any) -> None:
    """Texts and containers are cut to what is taken; what is nested too deep becomes JSON text."""
    for provider, expected in ((AMPLITUDE, amplitude), (MIXPANEL, mixpanel)):
        properties = encode_properties(provider, make_event(metadata={"key": sent}))
        assert properties["key"] == (sent if expected is ... else expected)


@both
def test_the_order_of_keys_changes_no_payload(provider: Provider) -> None:
    """The order in which a client sent its keys, or a map holds them, changes no payload."""
    wide = {name: {"list": [{"text": WIDE}], "x": WIDE} for name in WIDE if name < "005"}
    turned = {name: {"x": turn(WIDE), "list": [{"text": turn(WIDE)}]} for name in turn(wide)}
    payloads = encode_all(
        provider, [make_event(metadata=each, loose=each, **each) for each in (wide, turned)]
    )
    assert payloads[0] == payloads[1]


def turn(items: dict[str, Any]) -> dict[str, Any]:
    """Return the same items the other way round."""
    return dict(reversed(items.items()))


def test_mixpanel_gets_at_most_254_properties() -> None:
    """Mixpanel takes 254 properties: the event's own come first, then the others by name."""
    event = make_event(**{"user.id": "u", "page.url": "x", **WIDE, "metadata": {"!": 1}})
    properties = encode_properties(MIXPANEL, event)
    own = {"time", "distinct_id", "$insert_id", "$device_id", "$user_id", "ip", "$current_url"}
    own |= {"page_url", "session_id", "event_type", "project_id"}
    assert properties.keys() == own | set(sorted(WIDE)[: 254 - len(own)])
    assert WIDE.keys() | {"!"} <= encode_properties(AMPLITUDE, event).keys()


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
ids = texts.filter(lambda text: 0 < len(text.encode()) <= 255) | st.sampled_from(["0", "NULL"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e18, 1e18) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
keys = texts | st.sampled_from([*RESERVED, *SHORT_NAMES, "user.anonymous_id"])
objects = st.dictionaries(keys, values, max_size=5)


@st.composite
def storable_events(draw: st.DrawFn) -> Event:
    """Any event that validation lets through."""
    event = Event(
        event_id=draw(ids),
        project_id=draw(ids),
        session_id=draw(ids),
        event_type="custom",
        event_timestamp=Timestamp(
            seconds=draw(st.integers(FIRST_SECOND, END_SECOND - 1)),
            nanos=draw(st.integers(0, 999_999)) * 1000,
        ),
    )
    for name in ("event_name", "page_url", "ui_state_after"):
        if (text := draw(st.none() | texts)) is not None:
            setattr(event, name, text)
    if draw(st.booleans()):
        event.user_id = draw(ids)
    fill_struct(event.metadata, draw(objects), EVENT_SCHEMA.max_depth)
    fill_struct(event.attributes, draw(objects), EVENT_SCHEMA.max_depth)
    return event


@given(storable_events())
def test_any_event_becomes_json_within_every_limit(event: Event) -> None:
    """Any storable event becomes JSON within every limit, the same each time."""
    for provider in PROVIDERS:
        again = Event.FromString(event.SerializeToString())
        for version in VERSIONS:
            payload = encode_bytes(provider, event, version)
            assert payload == encode_bytes(provider, again, version)
            assert len(payload) < 1_000_000
        properties = encode_properties(provider, event)
        assert measure_depth(properties) <= (40 if provider is AMPLITUDE else 3)
    assert len(properties) < 255
    assert not set(RESERVED) & encode_properties(AMPLITUDE, event).keys()
    assert not {i.strip().lower() for i in read_ids(event)[1] if i} & REFUSED_IDS


@both
@pytest.mark.parametrize(
    "build",
    [
        lambda: {chr(1) * 3 + f"{number}": chr(2) * 9 for number in range(4000)},
        lambda: {"list": [chr(1) * 20] * 4000},
        lambda: {"list": [None] * 24_000},
        lambda: {"list": [-1.2345678901234567e-300] * 7800},
        lambda: {"text": chr(1) * 102_000},
        lambda: {f"${number}": None for number in range(7000)},
    ],
    ids=["keys", "texts", "nulls", "numbers", "text", "displaced"],
)
def test_the_largest_payload_stays_below_a_megabyte(
    provider: Provider, build: Callable[[], dict[str, Any]]
) -> None:
    """The largest event makes a payload far from a megabyte, whatever its JSON has to escape."""
    event = make_event()
    fill_struct(event.metadata, build(), EVENT_SCHEMA.max_depth)
    assert 85_000 < event.ByteSize() <= EVENT_SCHEMA.max_bytes
    assert all(len(encode_bytes(provider, event, version)) < 700_000 for version in VERSIONS)


def test_payloads_and_credentials_go_where_providers_look() -> None:
    """Payloads are joined as they are, and credentials go where a provider looks."""
    payloads = [b'{"a":1}', '{"é": 2}'.encode(), b"{}"]
    request = Amplitude('k"1', "http://127.0.0.1:1/batch").build_request(payloads)
    head = rb'{"api_key":"k\"1","options":{"min_id_length":1},"events":['
    assert request.body == head + b",".join(payloads) + b"]}"
    assert (request.url, dict(request.headers)) == (
        "http://127.0.0.1:1/batch",
        {"Content-Type": "application/json"},
    )
    request = Mixpanel("tok", MIXPANEL_URL).build_request(payloads)
    assert gzip.decompress(request.body) == b"[" + b",".join(payloads) + b"]"
    assert request == Mixpanel("tok", MIXPANEL_URL).build_request(payloads)
    assert request.url == "https://api.mixpanel.com/import?strict=1"
    assert dict(request.headers) == {
        "Authorization": f"Basic {b64encode(b'tok:').decode()}",
        "Content-Type": "application/json",
        "Content-Encoding": "gzip",
    }
    other = Mixpanel("tok", "https://api-eu.mixpanel.com/import?project_id=1")
    url = "https://api-eu.mixpanel.com/import?project_id=1&strict=1"
    assert other.build_request([]).url == url


@both
def test_no_representation_shows_provider_credentials(provider: Provider) -> None:
    """Neither a provider nor a request nor an answer shows credentials where it is printed."""
    answer = Answer(400, {"x": SECRET}, b'{"code":400,"error":"Invalid API key: s3cret"}')
    shown = [provider, provider.build_request([b"{}"]), answer, provider.decide([b"{}"], answer)]
    encoded = b64encode(f"{SECRET}:".encode()).decode()
    if provider is AMPLITUDE:
        assert not any(SECRET in repr(value) for value in shown)
    assert not any(SECRET in repr(value) or encoded in repr(value) for value in shown[:3])


# In place of an index, of five events.
ODD_INDEXES: list[Any] = [-1, 9, 1.0, True, "1", None, [1], {}]
ODD_LISTS: list[Any] = [[0, 5], 7, "3", {"3": 1}, [[[]]], [None]]

# Five events: two of one user on the same device, two of one device, one of neither.
PEOPLE = [("u-1", "d-1"), ("u-1", "d-1"), ("u-2", "d-2"), (None, "d-2"), (None, "d-3")]
EVENTS = [
    make_event(event_id=str(i), user__id=user, **{"user.anonymous_id": device})
    for i, (user, device) in enumerate(PEOPLE)
]
ALL = range(len(EVENTS))
FIVE = tuple(ALL)
HALVES = Decision(resend=((0, 1), (2, 3, 4)))
DROPPED = Suspicion("not ingested, without a reason (200)", is_refusal=False)
LATER = Decision(retry=dict.fromkeys(ALL, 0.0))


def wait(seconds: float, *indexes: int, **more: Any) -> Decision:
    """Return the outcome that these events, or all, wait for this many seconds."""
    return Decision(retry=dict.fromkeys(indexes or ALL, seconds), **more)


def decide(
    provider: Provider,
    status: int,
    body: Any = b"",
    events: list[Event] = EVENTS,
    headers: dict[str, str] | None = None,
) -> Decision:
    """Return what an answer means; a body that is not bytes is sent as JSON with its `code`."""
    sent = body if isinstance(body, bytes) else json.dumps({"code": status} | body).encode()
    return provider.decide(encode_all(provider, events), Answer(status, headers or {}, sent))


def encode_all(provider: Provider, events: list[Event]) -> list[bytes]:
    """Return the payloads of these events."""
    return [encode_bytes(provider, event, 1) for event in events]


@both
def test_without_an_answer_everything_is_sent_again(provider: Provider) -> None:
    """Without an answer nothing is known, and everything is sent again."""
    assert provider.decide(encode_all(provider, EVENTS), None) == LATER


STOPPING = [401]
SUSPICIOUS = [403, 404, 405, 410]
BACKING_OFF = [100, 201, 202, 204, 206, 301, 302, 303, 307, 308]
BACKING_OFF += [402, 406, 408, 409, 411, 415, 418, 421, 422, 425, 426, 431, 451, 500, 501, 504, 599]


@both
@pytest.mark.parametrize("status", [*BACKING_OFF, 200, 400, 502, 503, *STOPPING, *SUSPICIOUS])
@pytest.mark.parametrize("body", [b"", HTML, b"\xff", b"[1]", b'{"code":', b"[" * 5000])
def test_an_answer_without_a_report_settles_nothing(
    provider: Provider, status: int, body: bytes
) -> None:
    """Without the provider's own report nothing is done and nothing dead, whatever the status."""
    decision = decide(provider, status, body)
    if status in STOPPING:
        assert re.fullmatch(rf"the .* \({status}\)", decision.stop or "")
        assert decision == Decision(stop=decision.stop)
    elif status in SUSPICIOUS:
        refused = Suspicion(f"refused ({status})", is_refusal=True)
        assert decision == Decision(suspicion=refused)
    else:
        least = 2.0 if provider is MIXPANEL and status in (502, 503) else 0.0
        assert decision == wait(least)


@both
@pytest.mark.parametrize("body", [b"", HTML, {"error": "Payload too large"}])
def test_an_oversized_request_is_halved_to_one_event(provider: Provider, body: Any) -> None:
    """A request that is too large is halved, down to the event that is too large by itself."""
    assert decide(provider, 413, body) == HALVES
    assert decide(provider, 413, body, EVENTS[:2]) == Decision(resend=((0,), (1,)))
    dead = Decision(dead={0: "larger than a request may be (413)"})
    assert decide(provider, 413, body, EVENTS[:1]) == dead


@pytest.mark.parametrize(
    ("provider", "body"),
    [
        (AMPLITUDE, {"code": 200, "events_ingested": 5}),
        (MIXPANEL, {"code": 200, "num_records_imported": 5, "status": "OK"}),
    ],
)
def test_only_a_full_report_of_success_settles_events(
    provider: Provider, body: dict[str, Any]
) -> None:
    """Events are done where the whole report says so, and sent again where any of it does not."""
    assert decide(provider, 200, body) == Decision(done=frozenset(ALL))
    for name in body:
        for wrong in [4, 6, 400, "Bad Request", *ODD_INDEXES]:
            is_short = name == "events_ingested" and wrong == 4
            expected = Decision(suspicion=DROPPED) if is_short else LATER
            assert decide(provider, 200, body | {name: wrong}) == expected
        missing = {other: value for other, value in body.items() if other != name}
        assert decide(provider, 200, json.dumps(missing).encode()) == LATER
    for status in (201, 202, 206, 500):
        assert decide(provider, status, body | {"code": status}) == LATER


def dead(reason: str, *indexes: int, **more: Any) -> Decision:
    """Return the outcome that these events are refused for one reason."""
    return Decision(dead=dict.fromkeys(indexes, reason), **more)


STOPPED = Decision(stop="the API key was refused (400)")
FIELDS, VALUES = "events_with_missing_fields", "events_with_invalid_fields"
LENGTHS = "events_with_invalid_id_lengths"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {FIELDS: {"event_type": [1]}},
            dead("missing field event_type", 1, resend=((0, 2, 3, 4),)),
        ),
        ({VALUES: {"time": [0, 4]}}, dead("invalid field time", 0, 4, resend=((1, 2, 3),))),
        ({LENGTHS: {"user_id": [2]}}, dead("invalid length of user_id", 2, resend=((0, 1, 3, 4),))),
        ({"silenced_events": [3, 3]}, dead("silenced device", 3, resend=((0, 1, 2, 4),))),
        ({VALUES: {"time": list(ALL)}}, dead("invalid field time", *ALL)),
        (
            {
                FIELDS: {"user_id": [0]},
                VALUES: {"time": [1], "x\n\0y": [2]},
                "silenced_events": [3],
            },
            Decision(
                dead={
                    0: "missing field user_id",
                    1: "invalid field time",
                    2: "invalid field x  y",
                    3: "silenced device",
                },
                resend=((4,),),
            ),
        ),
        ({"missing_field": "event_type", FIELDS: {}}, HALVES),
        ({"error": "Invalid JSON request body", "silenced_events": []}, HALVES),
        ({}, HALVES),
        ({"code": 500, FIELDS: {"event_type": [1]}}, LATER),
        *(({VALUES: {"time": [1, odd]}}, LATER) for odd in ODD_INDEXES),
        *(({"silenced_events": odd}, LATER) for odd in ODD_LISTS),
        ({"error": "Invalid API key: s3cret"}, STOPPED),
        ({"error": "Invalid API key: s3cret", FIELDS: {"event_type": [1]}}, STOPPED),
        ({"missing_field": "api_key"}, STOPPED),
    ],
)
def test_amplitude_400_drops_only_the_named_events(
    body: dict[str, Any], expected: Decision
) -> None:
    """Named events are dropped with the reason and the rest sent again; a lie is not believed."""
    assert decide(AMPLITUDE, 400, body) == expected


@pytest.mark.parametrize(
    ("provider", "body", "reason"),
    [
        (AMPLITUDE, {}, "refused (400)"),
        (AMPLITUDE, {"error": "bad\n" + "x" * 999}, "bad " + "x" * 296),
        (AMPLITUDE, {"error": [[]], "missing_field": "event_type"}, "missing field event_type"),
        (MIXPANEL, {}, "refused (400)"),
        (MIXPANEL, {"error": "not JSON", "failed_records": []}, "not JSON"),
    ],
)
def test_an_unnamed_event_alone_is_the_refused_one(
    provider: Provider, body: dict[str, Any], reason: str
) -> None:
    """Where a 400 names no event, the one that is alone in its request is the one meant."""
    assert decide(provider, 400, body) == HALVES
    assert decide(provider, 400, body, EVENTS[:1]) == dead(reason, 0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, wait(30)),
        (HTML, wait(30)),
        ({"throttled_events": [1, 3]}, wait(30, 1, 3, resend=((0, 2, 4),))),
        ({"throttled_users": {"u-1": 1500}}, wait(30, 0, 1, resend=((2, 3, 4),))),
        ({"throttled_devices": {"d-2": 1500}}, wait(30, 2, 3, resend=((0, 1, 4),))),
        (
            {"throttled_devices": ["d-2"], "throttled_users": []},
            wait(30, 2, 3, resend=((0, 1, 4),)),
        ),
        (
            {"throttled_events": [4], "throttled_users": {"u-1": 1}, "throttled_devices": {"?": 1}},
            wait(30, 0, 1, 4, resend=((2, 3),)),
        ),
        ({"throttled_events": list(ALL)}, wait(30)),
        ({"throttled_users": {"nobody": 1500}}, wait(30)),
        ({"throttled_events": [5, -1, True, [], None]}, wait(30)),
        (
            {"throttled_events": 1, "throttled_users": 7, "throttled_devices": [[]]},
            wait(30, 1, resend=((0, 2, 3, 4),)),
        ),
    ],
)
def test_amplitude_429_delays_only_the_throttled_events(body: Any, expected: Decision) -> None:
    """What is throttled waits half a minute and the rest is sent at once; else everything waits."""
    assert decide(AMPLITUDE, 429, body) == expected


def over_quota(*indexes: int) -> Decision:
    """Return the outcome that these events wait for an hour: their user is over its quota."""
    return Decision(
        retry=dict.fromkeys(indexes, 3600.0), retry_reasons=dict.fromkeys(indexes, QUOTA_REASON)
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {"exceeded_daily_quota_users": {"u-1": 500_001}},
            replace(over_quota(0, 1), resend=((2, 3, 4),)),
        ),
        (
            {"exceeded_daily_quota_devices": {"d-2": 9}, "exceeded_daily_quota_users": {}},
            replace(over_quota(2, 3), resend=((0, 1, 4),)),
        ),
        ({"exceeded_daily_quota_devices": {"d-1": 1, "d-2": 1, "d-3": 1}}, over_quota(*ALL)),
        (
            {"exceeded_daily_quota_users": {"u-1": 1}, "throttled_devices": {"d-2": 1}},
            Decision(
                retry={0: 3600.0, 1: 3600.0, 2: 30.0, 3: 30.0},
                retry_reasons=over_quota(0, 1).retry_reasons,
                resend=((4,),),
            ),
        ),
        ({"exceeded_daily_quota_users": {"nobody": 1}}, wait(30)),
    ],
)
def test_amplitude_429_delays_users_over_quota_by_hours(body: Any, expected: Decision) -> None:
    """Events of users and devices over their daily quota are tried hourly, the rest at once."""
    assert decide(AMPLITUDE, 429, body) == expected


def test_amplitude_429_respects_the_requested_time() -> None:
    """Nothing is sent before the time that a throttling provider has asked for."""
    body = {"throttled_events": [1]}
    expected = Decision(retry={0: 9.0, 1: 30.0, 2: 9.0, 3: 9.0, 4: 9.0})
    assert decide(AMPLITUDE, 429, body, headers={"Retry-After": "9"}) == expected
    assert decide(AMPLITUDE, 429, body, headers={"Retry-After": "45"}) == wait(45)


def fail(*indexes: Any, **more: Any) -> dict[str, Any]:
    """Return a report of Mixpanel on refused events."""
    keys = {"insert_id": "x", "field": "properties.time", "message": "'properties.time' is invalid"}
    return {"failed_records": [{"index": index, **keys} for index in indexes], **more}


INVALID = "'properties.time' is invalid"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (fail(1, num_records_imported=4), dead(INVALID, 1, done=frozenset({0, 2, 3, 4}))),
        (fail(1, 1), dead(INVALID, 1, done=frozenset({0, 2, 3, 4}))),
        (fail(*ALL, num_records_imported=0), dead(INVALID, *ALL)),
        (fail(1, num_records_imported=3), dead(INVALID, 1, retry=dict.fromkeys((0, 2, 3, 4), 0.0))),
        (fail(1, num_records_imported="4"), wait(0, 0, 2, 3, 4, dead={1: INVALID})),
        ({"failed_records": [{"index": 4}]}, dead("invalid field ", 4, done=frozenset(range(4)))),
        (
            {"failed_records": [{"index": 0, "field": "event", "message": [[]]}]},
            dead("invalid field event", 0, done=frozenset({1, 2, 3, 4})),
        ),
        *((fail(1, odd), LATER) for odd in ODD_INDEXES),
        *(({"failed_records": odd}, LATER) for odd in ODD_LISTS),
        ({"code": 200, **fail(1)}, LATER),
        ({"error": "invalid"}, HALVES),
    ],
)
def test_mixpanel_400_settles_only_the_named_events(
    body: dict[str, Any], expected: Decision
) -> None:
    """Named events are dead and the others done; an answer with nonsense in it proves nothing."""
    assert decide(MIXPANEL, 400, body) == expected


@pytest.mark.parametrize("status", [429, 502, 503])
@pytest.mark.parametrize("body", [b"", HTML, {"status": "OK", "num_records_imported": 5}])
def test_mixpanel_is_retried_after_two_seconds_at_least(status: int, body: Any) -> None:
    """Mixpanel asks for two seconds at least."""
    assert decide(MIXPANEL, status, body) == wait(2)
    assert decide(MIXPANEL, status, body, headers={"Retry-After": "7"}) == wait(7)


MONDAY = "Mon, 15 Jan 2024 10:30:00 GMT"


@both
@pytest.mark.parametrize("status", [302, 400, 408, 500, 504])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RETRY-AFTER": " 7 "}, 7),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "9" * 6000}, 3600),
        ({"retry-after": "Mon, 15 Jan 2024 10:31:30 GMT", "date": MONDAY}, 90),
        ({"retry-after": "Mon, 15 Jan 2024 10:31:30", "date": MONDAY}, 90),
        ({"retry-after": "Tue, 15 Jan 2030 10:31:30 GMT", "date": MONDAY}, 3600),
        ({"retry-after": "Mon, 15 Jan 2024 10:29:00 GMT", "date": MONDAY}, 0),
        *(({"retry-after": odd, "date": MONDAY}, 0) for odd in ("", "-7", "1e9", "\u0667", "soon")),
        ({"retry-after": "Mon, 15 Jan 2024 10:31:30 +99999999999999", "date": MONDAY}, 0),
        ({"retry-after": MONDAY}, 0),
    ],
)
def test_retry_after_is_respected_up_to_an_hour(
    provider: Provider, status: int, headers: dict[str, str], seconds: float
) -> None:
    """Retry-After is respected in both its forms, up to an hour, and nonsense is ignored."""
    assert decide(provider, status, headers=headers) == wait(seconds)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 7) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
indexes = st.lists(st.integers(-1, 6) | json_values, max_size=5)
reports = st.fixed_dictionaries(
    {},
    optional={
        "code": st.sampled_from([200, 400, 429]) | json_values,
        "error": json_values | st.just("Invalid API key: x"),
        "missing_field": json_values,
        **{name: st.dictionaries(st.text(), indexes) | json_values for name in (FIELDS, VALUES)},
        "silenced_events": indexes | json_values,
        "throttled_events": indexes | json_values,
        "throttled_users": st.just({"u-1": 9}) | json_values,
        "throttled_devices": st.just(["d-2"]) | json_values,
        "exceeded_daily_quota_users": st.just({"u-2": 1}) | json_values,
        "exceeded_daily_quota_devices": st.just({"d-3": 1}) | json_values,
        "events_ingested": st.integers(-1, 6) | json_values,
        "num_records_imported": st.integers(-1, 6) | json_values,
        "status": st.just("OK") | json_values,
        "failed_records": st.lists(
            st.fixed_dictionaries({"index": st.integers(-1, 6), "message": st.text()}) | json_values
        ),
    },
)
bodies = st.binary() | (reports | json_values).map(lambda value: json.dumps(value).encode())
statuses = st.sampled_from([200, 400, 413, 429, 401, 403, 503]) | st.integers(-1, 1000)
answers = st.none() | st.builds(
    Answer,
    statuses,
    st.dictionaries(st.sampled_from(["Retry-After", "Date", "X"]), st.text() | st.just(MONDAY)),
    bodies,
)


@both
@given(answer=answers, count=st.integers(0, 5))
def test_any_answer_gives_each_event_one_fate(
    provider: Provider, answer: Answer | None, count: int
) -> None:
    """Whatever is answered, each event has exactly one fate, and none is done without success."""
    decision = provider.decide([encode_bytes(provider, e, 1) for e in EVENTS[:count]], answer)
    resent = [index for group in decision.resend for index in group]
    fates = [*decision.done, *decision.dead, *decision.retry, *resent]
    is_whole = decision.stop or decision.suspicion
    assert sorted(fates) == ([] if is_whole else list(range(count)))
    assert decision.retry_reasons.keys() <= decision.retry.keys()
    assert all(0 < len(group) < count for group in decision.resend)
    assert all(0 <= seconds <= 3600 for seconds in decision.retry.values())
    assert all(reason.isprintable() for reason in decision.dead.values())
    if decision.done:
        assert answer is not None
        report = json.loads(answer.body)
        imported = report.get("events_ingested", report.get("num_records_imported"))
        if answer.status == 200:
            assert (report["code"], imported) == (200, count)
        else:
            assert (provider, answer.status) == (MIXPANEL, 400)
            assert {record["index"] for record in report["failed_records"]} == set(decision.dead)
    if decision.dead:
        assert answer is not None
        assert answer.status in (400, 413)


def send(request: Request, timeout: float) -> Answer | None:
    """Post a request; return None if no complete answer came, or nothing for some seconds."""
    url = urlsplit(request.url)
    with closing(http.client.HTTPConnection(url.netloc, timeout=timeout)) as connection:
        try:
            path = f"{url.path}?{url.query}" if url.query else url.path
            connection.request("POST", path, request.body, dict(request.headers))
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        except (OSError, http.client.HTTPException):
            return None


Pair = tuple[Provider, ProviderServer]


@pytest.fixture(params=["amplitude", "mixpanel"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Provide a provider's server, and ours that sends to it."""
    if request.param == "amplitude":
        with AmplitudeServer(SECRET) as amplitude:
            yield Amplitude(SECRET, amplitude.url), amplitude
    else:
        with MixpanelServer(SECRET) as mixpanel:
            yield Mixpanel(SECRET, mixpanel.url), mixpanel


def exchange(provider: Provider, payloads: list[bytes], timeout: float = 20.0) -> Decision:
    """Return what comes of sending these payloads."""
    return provider.decide(payloads, send(provider.build_request(payloads), timeout))


def test_a_full_request_is_taken_and_repeatable(pair: Pair) -> None:
    """A request of as many events as are allowed is taken, and a second time changes nothing."""
    provider, server = pair
    payloads = encode_all(provider, [make_event(event_id=f"{i}") for i in range(2000)])
    for _ in range(2):
        assert exchange(provider, payloads) == Decision(done=frozenset(range(2000)))
        assert len(server.ingested) == len(server.insert_ids) == provider.max_events == 2000
    assert {delivery.payload for delivery in server.deliveries} == set(payloads)
    assert [*server.statuses] == [200, 200]
    assert server.payloads_of(server.deliveries[0].insert_id) == {payloads[0]}


def test_only_requests_over_the_largest_are_halved(pair: Pair) -> None:
    """A request of as many bytes as are allowed is taken, and one of more is halved."""
    provider, server = pair
    large = {f"{number:03}": "x" * 250 for number in range(200)}
    payloads = encode_all(provider, [make_event(event_id=f"{i}", **large) for i in range(400)])
    fitting = min(provider.max_bytes // len(payloads[-1]), 400)
    assert exchange(provider, payloads[:fitting]) == Decision(done=frozenset(range(fitting)))
    many = payloads[:1] * (server.max_bytes // len(payloads[0]) + 1)
    assert len(exchange(provider, many).resend) == 2
    assert [*server.statuses] == [200, 413]


@settings(deadline=None, max_examples=50)
@given(event=storable_events())
def test_any_event_is_refused_only_for_its_time(pairs: list[Pair], event: Event) -> None:
    """No storable event is refused for anything but its time."""
    event.event_timestamp.seconds = abs(event.event_timestamp.seconds) % 10**9 + 10**8
    for provider, _ in pairs:
        assert exchange(provider, encode_all(provider, [event])).done == {0}


@pytest.fixture(scope="module")
def pairs() -> Iterator[list[Pair]]:
    """Both providers."""
    with AmplitudeServer(SECRET) as amplitude, MixpanelServer(SECRET) as mixpanel:
        yield [
            (Amplitude(SECRET, amplitude.url), amplitude),
            (Mixpanel(SECRET, mixpanel.url), mixpanel),
        ]


def test_a_refused_event_is_dead_without_its_neighbours(pair: Pair) -> None:
    """One refused event is dead by name, its neighbours are taken."""
    provider, server = pair
    payloads = encode_all(provider, EVENTS)
    payloads[2] = re.sub(rb'"time":\d+', b'"time":"noon"', payloads[2])
    decision = exchange(provider, payloads)
    assert list(decision.dead) == [2]
    for group in decision.resend:
        assert exchange(provider, [payloads[index] for index in group]).done == {0, 1, 2, 3}
    assert len(server.insert_ids) == 4


@pytest.mark.parametrize("ahead", [-(60 * 365 * 86_400), -1, 3500, 3700])
def test_mixpanel_refuses_events_outside_its_times(pairs: list[Pair], ahead: int) -> None:
    """An event from before 1971 or over an hour ahead is dead at Mixpanel, with that reason."""
    event = make_event(event_id=f"{ahead}")
    event.event_timestamp.seconds = int(time.time()) + ahead
    fates = [exchange(provider, encode_all(provider, [event])) for provider, _ in pairs]
    refused = dead("'properties.time' is invalid", 0)
    taken = Decision(done=frozenset({0}))
    assert fates == [taken, taken if -1 <= ahead <= 3500 else refused]


def test_wrong_credentials_stop_and_right_ones_resume(pair: Pair) -> None:
    """Wrong credentials stop a lane, and right ones are taken again."""
    provider, server = pair
    server.credential = "changed"
    stopped = exchange(provider, encode_all(provider, EVENTS))
    assert "refused" in (stopped.stop or "")
    assert stopped == Decision(stop=stopped.stop)
    server.credential = SECRET
    assert exchange(provider, encode_all(provider, EVENTS)).done == set(ALL)


@pytest.mark.parametrize("fault", Fault)
def test_events_with_lost_answers_are_repeated_harmlessly(pair: Pair, fault: Fault) -> None:
    """Where the answer to ingested events fails to arrive they are sent again, to no effect."""
    provider, server = pair
    server.scripts.append(Script(fault=fault))
    assert exchange(provider, encode_all(provider, EVENTS), timeout=1.0) == LATER
    wait_until(lambda: len(server.statuses) == 1)  # a busy one may take it after that second
    assert exchange(provider, encode_all(provider, EVENTS)).done == set(ALL)
    assert (len(server.deliveries), len(server.ingested)) == (10, 5)


def test_a_stand_in_answers_as_its_script_says(pair: Pair) -> None:
    """A server answers as it is told, once or until told otherwise, and ingests what it is told."""
    provider, server = pair
    redirect = Reply(307, b"", {"Location": server.url, "Retry-After": "3"})
    server.scripts += [Script(redirect), Script(Reply(200, HTML)), Script()]
    server.behave = lambda _: Script(Reply(500, b"", ingest=frozenset({0})))
    payloads = encode_all(provider, EVENTS)
    assert exchange(provider, payloads) == wait(3)
    assert exchange(provider, payloads) == LATER
    assert (len(server.insert_ids), len(server.deliveries)) == (0, 10)
    assert exchange(provider, payloads).done == set(ALL)
    assert exchange(provider, encode_all(provider, [make_event(), EVENTS[0]])).done == set()
    assert len(server.insert_ids) == 6


def test_a_stand_in_ends_at_once_with_clients(pair: Pair) -> None:
    """A server with idle, stalled and dripping clients ends at once, and its port is free again."""
    provider, server = pair
    server.scripts += [Script(fault=Fault.HANG), Script(fault=Fault.DRIP)]
    payloads = encode_all(provider, EVENTS)
    with (
        ThreadPoolExecutor(2) as threads,
        socket.create_connection(("127.0.0.1", server.port)) as idle,
    ):
        answers = [threads.submit(exchange, provider, payloads) for _ in range(2)]
        wait_until(lambda: len(server.statuses) == 2)
        server.close()
        assert [answer.result() for answer in answers] == [LATER, LATER]
        assert idle.recv(1) == b""
    with type(server)(SECRET, server.port):
        assert exchange(provider, payloads).done == set(ALL)
