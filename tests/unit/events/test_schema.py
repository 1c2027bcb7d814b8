"""The schema is read from the descriptor, and from nowhere else."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, wrappers_pb2
from google.protobuf.descriptor import Descriptor

from productgraph.v1.event_pb2 import Event
from server.events.schema import EVENT_SCHEMA, MAX_BATCH_SIZE, MAX_REQUEST_BYTES, Kind, read_schema
from tests.support.services import ROOT, clean_environment

# The documentation's tables of fields, in its order; the last one takes what it does not name.
DOCUMENTED = [
    *("event_id", "project_id", "session.id", "event.type", "event.timestamp"),
    *(
        "user.id",
        "event.name",
        "event.sequence",
        "page.path",
        "page.title",
        "page.url",
        "page.referrer",
    ),
    *(
        "ui.component.name",
        "ui.component.path",
        "ui.component.type",
        "ui.action",
        "ui.element",
        "ui.element.text",
    ),
    *("ui.state.key", "ui.state.before", "ui.state.after"),
    *("gen_ai.journey.id", "gen_ai.journey.step.id", "gen_ai.journey.step.name"),
    *(
        "api.method",
        "api.path",
        "api.status_code",
        "api.duration_ms",
        "error.type",
        "error.message",
        "error.stack",
    ),
    *("duration_ms", "metadata", "attributes"),
]
EVENT_TYPES = [
    *(
        "page.view",
        "page.leave",
        "ui.click",
        "ui.input",
        "ui.scroll",
        "ui.focus",
        "ui.blur",
        "ui.submit",
        "state.change",
    ),
    *("api.request", "api.response", "journey.step", "error", "performance", "custom"),
]
FIELDS = {field.wire_name: field for field in EVENT_SCHEMA.fields}

NEW_FIELDS = """
  optional string device_model = 35 [
    json_name = "device.model",
    (field_rules) = {max_bytes: 8}
  ];
  optional int32 device_uptime_ms = 36 [
    json_name = "device.uptime_ms",
    (field_rules) = {rounding: ROUNDING_NEAREST}
  ];
}
"""
NEW_COLUMNS = "ALTER TABLE events ADD COLUMN device_model text, ADD COLUMN device_uptime_ms integer"

# What the service does with a request's body, by the modules that know the schema.
STORE = """
import sys
from productgraph.v1 import event_pb2
from server.storage.connection import connected, open_engine
from server.events.json_codec import JsonCodec
from server.events.copy_rows import RowEncoder
from server.events.schema import EVENT_SCHEMA
from server.storage.events import EventStore
from server.events.problems import InvalidEvent
from server.events.parsed import MalformedEvent
from server.events.validation import Validator

validator, encoder, rows = Validator(EVENT_SCHEMA), RowEncoder(EVENT_SCHEMA), []
for parsed in JsonCodec(EVENT_SCHEMA).parse_batch(sys.stdin.buffer.read()).events:
    try:
        if isinstance(parsed, MalformedEvent):
            raise InvalidEvent(validator.explain_malformed(parsed, "p"))
        validator.check_event(parsed, "p")
        rows.append(encoder.encode(parsed))
    except InvalidEvent as problem:
        print(problem)
with connected(open_engine(sys.argv[1])) as connection:
    EventStore(encoder.columns).save(connection, rows, 5)
"""


def test_schema_fields_have_documented_names_and_order() -> None:
    """The fields are the documented ones, in the documented order of checking."""
    assert [field.wire_name for field in EVENT_SCHEMA.fields] == DOCUMENTED
    assert [field.position for field in EVENT_SCHEMA.fields] == list(range(len(DOCUMENTED)))


def test_wire_and_column_names_differ_only_in_dots() -> None:
    """A field is called alike on the wire and in the table, but for the dots."""
    assert all(name.replace(".", "_") == field.name for name, field in FIELDS.items())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Kind.INTEGER, {"api.status_code"}),
        (Kind.LONG, {"event.sequence", "api.duration_ms", "duration_ms"}),
        (Kind.TIMESTAMP, {"event.timestamp"}),
        (Kind.OBJECT, {"metadata", "attributes"}),
    ],
)
def test_schema_kinds_are_the_documented_ones(kind: Kind, names: set[str]) -> None:
    """Numbers, instants and objects are what the documentation says; all else is text."""
    assert {field.wire_name for field in EVENT_SCHEMA.of_kind(kind)} == names


def test_schema_rules_are_the_documented_ones() -> None:
    """Required are the first five fields, limited the ids and the whole, rounded the durations."""
    assert (MAX_BATCH_SIZE, MAX_REQUEST_BYTES) == (1000, 10_485_760)
    assert (EVENT_SCHEMA.max_bytes, EVENT_SCHEMA.max_depth) == (102_400, 32)
    found = {
        rule: {name for name, field in FIELDS.items() if getattr(field.rules, rule)}
        for rule in (
            descriptor.name for descriptor in EVENT_SCHEMA.fields[0].rules.DESCRIPTOR.fields
        )
    }
    assert found == {
        "required": set(DOCUMENTED[:5]),
        "allowed_values": {"event.type"},
        "max_bytes": {"event_id", "project_id", "session.id", "user.id"},
        "max_items": set(),
        "rounding": {"api.duration_ms", "duration_ms"},
        "matches_api_key": {"project_id"},
        "takes_unnamed_fields": {"attributes"},
    }
    assert {FIELDS[name].rules.max_bytes for name in found["max_bytes"]} == {255}
    assert list(FIELDS["event.type"].rules.allowed_values) == EVENT_TYPES
    assert EVENT_SCHEMA.catch_all is FIELDS["attributes"]


def test_optional_fields_tell_zero_from_absence() -> None:
    """Of every optional field it is known whether it was sent, so that 0 and '' are not absence."""
    lacking = {field.json_name for field in Event.DESCRIPTOR.fields if not field.has_presence}
    assert lacking == {"event_id", "project_id", "session.id", "event.type"}


def describe(**changes: object) -> Descriptor:
    """Return a message with one field of this description."""
    file = descriptor_pb2.FileDescriptorProto(name="odd.proto", syntax="proto3")
    file.message_type.add(name="Odd").field.add(name="odd", number=1, label=1)
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    [field] = file.message_type[0].field
    field.MergeFrom(descriptor_pb2.FieldDescriptorProto(**changes))  # type: ignore[arg-type]
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return pool.FindMessageTypeByName("Odd")


@pytest.mark.parametrize(
    "change",
    [
        {"type": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES},
        {"type": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL},
        {"type": descriptor_pb2.FieldDescriptorProto.TYPE_UINT64},
        {"type": descriptor_pb2.FieldDescriptorProto.TYPE_STRING, "label": 3},
        {"type_name": ".google.protobuf.StringValue"},
    ],
    ids=str,
)
def test_a_field_without_a_column_type_is_refused(change: dict[str, object]) -> None:
    """A field of a type that has no column is refused when the service starts, by its name."""
    descriptor = describe(**change)
    with pytest.raises(ValueError, match=r"Odd\.odd: no column type"):
        read_schema(descriptor)


@pytest.fixture(scope="module")
def extended_gen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the code generated from a copy of our protos in which Event has two more fields."""
    directory = tmp_path_factory.mktemp("extended")
    protos, gen = directory / "protos", directory / "gen"
    shutil.copytree(ROOT / "protos", protos)
    shutil.copytree(ROOT / "gen", gen)
    definition = protos / "productgraph/v1/event.proto"
    definition.write_text(definition.read_text().rstrip().removesuffix("}") + NEW_FIELDS)
    files = [str(path.relative_to(protos)) for path in protos.rglob("*.proto")]
    generate = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={gen}", *files]
    subprocess.run(generate, cwd=protos, check=True, timeout=60)
    return gen


def test_a_new_field_needs_only_proto_and_migration(
    extended_gen: Path, create_migrated: Callable[[], str]
) -> None:
    """To add a field, one edits the .proto, generates, and adds a column: nothing else."""
    url = create_migrated()
    required = dict.fromkeys(DOCUMENTED[:3], "p")
    required |= {"event.type": "custom", "event.timestamp": "2024-01-15T12:00:00Z"}
    new: list[dict[str, object]] = [
        {"device.model": "a\tb", "device.uptime_ms": 12.5},
        {"device.model": "", "device.uptime_ms": 0},
        {},
        {"device.model": "too long a name"},
        {"device.uptime_ms": "soon"},
        {"device.uptime_ms": 2**31},
    ]
    events = [{**required, "event_id": str(number), **more} for number, more in enumerate(new)]
    environment = clean_environment({})
    environment["PYTHONPATH"] = f"{extended_gen}:{environment['PYTHONPATH']}"
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(NEW_COLUMNS)
        connection.commit()
        stored = subprocess.run(
            [sys.executable, "-c", STORE, url],
            input=json.dumps({"events": events}).encode(),
            env=environment,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (stored.returncode, stored.stderr) == (0, b"")
        assert stored.stdout.decode().splitlines() == [
            "device.model: longer than 8 bytes",
            "device.uptime_ms: must be an integer",
            "device.uptime_ms: must be an integer of 32 bits",
        ]
        cursor.execute(
            "SELECT device_model, device_uptime_ms, attributes FROM events ORDER BY event_id"
        )
        assert cursor.fetchall() == [("a\tb", 13, None), ("", 0, None), (None, None, None)]
