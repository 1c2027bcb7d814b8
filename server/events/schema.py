"""The Event schema as the rest of the service reads it: fields, wire names and rules."""

from dataclasses import dataclass
from enum import Enum
from itertools import chain

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from productgraph.v1 import rules_pb2
from productgraph.v1.event_ingestion_service_pb2 import IngestEventsRequest
from productgraph.v1.event_pb2 import Event


class Kind(Enum):
    """What a field holds; the value is the PostgreSQL type of its column."""

    TEXT = "text"
    INTEGER = "integer"
    LONG = "bigint"
    TIMESTAMP = "timestamp with time zone"
    OBJECT = "jsonb"


_SCALAR_KINDS = {
    FieldDescriptor.TYPE_STRING: Kind.TEXT,
    FieldDescriptor.TYPE_INT32: Kind.INTEGER,
    FieldDescriptor.TYPE_INT64: Kind.LONG,
}
_MESSAGE_KINDS = {
    "google.protobuf.Timestamp": Kind.TIMESTAMP,
    "google.protobuf.Struct": Kind.OBJECT,
}
_INTEGER_BITS = {Kind.INTEGER: 32, Kind.LONG: 64}


@dataclass(frozen=True)
class Field:
    """One field of the schema; `position` is its place in the order of checking, from 0."""

    position: int
    name: str
    wire_name: str
    kind: Kind
    rules: rules_pb2.FieldRules

    @property
    def range(self) -> range:
        """The integers that the field can hold."""
        limit = 1 << (_INTEGER_BITS[self.kind] - 1)
        return range(-limit, limit)


@dataclass(frozen=True)
class Schema:
    """The fields of an event in the order of their checking, and the limits of the whole."""

    fields: tuple[Field, ...]
    max_bytes: int
    max_depth: int

    def of_kind(self, *kinds: Kind) -> tuple[Field, ...]:
        """Return the fields of these kinds, in order."""
        return tuple(field for field in self.fields if field.kind in kinds)

    @property
    def columns(self) -> tuple[Field, ...]:
        """Those whose columns an edge fills, by their kinds: they are read a kind at a time."""
        kinds = (Kind.TEXT,), (Kind.INTEGER, Kind.LONG), (Kind.OBJECT,)
        return tuple(chain.from_iterable(self.of_kind(*each) for each in kinds))

    @property
    def catch_all(self) -> Field:
        """The field that takes what the schema does not name."""
        return next(field for field in self.fields if field.rules.takes_unnamed_fields)


def read_schema(descriptor: Descriptor) -> Schema:
    """Read a schema off a message descriptor. Raises ValueError for what has no column."""
    limits = descriptor.GetOptions().Extensions[rules_pb2.message_rules]
    fields = tuple(_read_field(i, field) for i, field in enumerate(descriptor.fields))
    return Schema(fields, limits.max_bytes, limits.max_depth)


def _read_field(position: int, field: FieldDescriptor) -> Field:
    rules = field.GetOptions().Extensions[rules_pb2.field_rules]
    kind = _kind_of(field)
    if not field.has_presence and not rules.required:
        raise ValueError(f"{field.full_name}: must be optional or required")
    return Field(position, field.name, field.json_name, kind, rules)


def _kind_of(field: FieldDescriptor) -> Kind:
    kind = (
        _MESSAGE_KINDS.get(field.message_type.full_name)
        if field.message_type
        else _SCALAR_KINDS.get(field.type)
    )
    if kind is None or field.is_repeated:
        raise ValueError(f"{field.full_name}: no column type for a field of this type")
    return kind


_REQUEST = IngestEventsRequest.DESCRIPTOR
_EVENTS = _REQUEST.fields_by_name["events"]

EVENT_SCHEMA = read_schema(Event.DESCRIPTOR)
MAX_BATCH_SIZE = _EVENTS.GetOptions().Extensions[rules_pb2.field_rules].max_items
MAX_REQUEST_BYTES = _REQUEST.GetOptions().Extensions[rules_pb2.message_rules].max_bytes
