"""Protobuf bytes to Events, each parsed by itself."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from productgraph.v1.event_pb2 import Event
from server.deadline import NEVER, Deadline
from server.errors import InvalidArgument
from server.events.batch import ParsedBatch
from server.events.encoded_events_pb2 import EncodedEvents
from server.events.free_form import REPLACEMENT, replace_nul
from server.events.parsed import ColumnReader, MalformedEvent, ParsedEvent
from server.events.problems import (
    NOT_A_TIMESTAMP,
    NOT_AN_EVENT,
    NOT_AN_OBJECT,
    NOT_UTF8,
    Fault,
    Problem,
    report_excess,
    report_nesting,
)
from server.events.schema import MAX_BATCH_SIZE, Field, Kind, Schema
from server.protocols import GRPC

_READABLE_SHARE = 8


class ProtobufCodec:
    """Reads batches of events by one schema."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._texts = schema.of_kind(Kind.TEXT)
        self._objects = schema.of_kind(Kind.OBJECT)
        self._columns = ColumnReader(schema)
        self._loose_type = _loosen(Event)
        # An event with repeated or unknown fields is smaller than what was sent; from this size on,
        # that is not looked at.
        self._readable_bytes = _READABLE_SHARE * schema.max_bytes
        self._too_large = report_excess(schema.max_bytes)

    def parse_batch(
        self, request: bytes, deadline: Deadline = NEVER, _project_id: str | None = None
    ) -> ParsedBatch:
        """Return the events of an encoded IngestEventsRequest, each parsed when it is asked for.

        Raises InvalidArgument if the request is not readable or holds too many events, and
        Unavailable if its time is over.
        """
        deadline.check()
        try:
            frames = EncodedEvents.FromString(request).events
        except DecodeError:
            raise InvalidArgument("request: not an IngestEventsRequest") from None
        if len(frames) > MAX_BATCH_SIZE:
            raise InvalidArgument(f"events: more than {MAX_BATCH_SIZE} in one batch")
        events = map(self._parse_event, frames)
        return ParsedBatch(GRPC, len(frames), len(request), events, frames.__getitem__)

    def _parse_event(self, encoded: bytes) -> ParsedEvent | MalformedEvent:
        if len(encoded) > self._readable_bytes:
            return MalformedEvent(Event(), 0, self._too_large)
        try:
            event = Event.FromString(encoded)
        except DecodeError:
            return self._find_malformed(encoded)
        max_bytes = self._schema.max_bytes
        if len(encoded) > max_bytes and event.ByteSize() > max_bytes:
            # Its free-form fields would take seconds to read.
            return MalformedEvent(event, len(self._schema.fields), self._too_large)
        parsed = self._columns.read(event, encoded)
        if isinstance(parsed, MalformedEvent) or _is_storable(parsed):
            return parsed
        self._replace_nul(event)
        return self._columns.read(event, event.SerializeToString())

    def _replace_nul(self, event: Event) -> None:
        for field in self._texts:
            if "\0" in (text := getattr(event, field.name)):
                setattr(event, field.name, text.replace("\0", REPLACEMENT))
        for field in self._objects:
            replace_nul(getattr(event, field.name))

    def _find_malformed(self, encoded: bytes) -> MalformedEvent:
        """Read what can be read, up to the first field that cannot."""
        event = Event()
        try:
            loose = self._loose_type.FromString(encoded)
        except DecodeError:
            return MalformedEvent(event, 0, NOT_AN_EVENT)
        present = {field.name for field, _ in loose.ListFields()}
        for field in self._schema.fields:
            if field.name in present and (fault := self._copy_field(loose, event, field)):
                return MalformedEvent(event, field.position, Problem(field.wire_name, *fault))
        return MalformedEvent(event, 0, NOT_AN_EVENT)

    def _copy_field(self, loose: Any, event: Event, field: Field) -> Fault | None:
        """Copy one field; return what is wrong if its bytes are unreadable."""
        value, target = getattr(loose, field.name), getattr(event, field.name)
        try:
            if isinstance(target, Message):
                target.MergeFromString(value)
            elif isinstance(value, bytes):
                setattr(event, field.name, value.decode())
            else:
                setattr(event, field.name, value)
        except UnicodeDecodeError:
            return NOT_UTF8
        except DecodeError as error:
            return self._explain_unreadable(field, error)
        return None

    def _explain_unreadable(self, field: Field, error: DecodeError) -> Fault:
        if field.kind is Kind.TIMESTAMP:
            return NOT_A_TIMESTAMP
        # The parser's own limit on nesting lies beyond the schema's.
        if "MaxDepth" in str(error):
            return report_nesting(self._schema.max_depth)
        return NOT_AN_OBJECT


def _is_storable(parsed: ParsedEvent) -> bool:
    """Tell whether no text has U+0000, nor any object's JSON what may be its escape."""
    joined = "".join(parsed.columns)
    return "\0" not in joined and r"\u0000" not in joined


def _loosen(message_type: type[Message]) -> type[Message]:
    """Return the same message with bytes for texts and messages, which any bytes can be read as."""
    file = descriptor_pb2.FileDescriptorProto(name="loose.proto", package="loose", syntax="proto3")
    message_type.DESCRIPTOR.CopyToProto(file.message_type.add())
    [message] = file.message_type
    message.ClearField("options")
    for field in message.field:
        field.ClearField("options")
        if field.type in (field.TYPE_STRING, field.TYPE_MESSAGE):
            field.type = field.TYPE_BYTES
            field.ClearField("type_name")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"loose.{message.name}"))
