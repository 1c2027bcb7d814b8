"""Protobuf bytes to Events, each parsed by itself."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import DecodeError, Message

from productgraph.v1.event_pb2 import Event
from server.deadline import NEVER, Deadline
from server.errors import InvalidArgument
from server.events.batch import ParsedBatch, ReadEvent
from server.events.copy_rows import Row
from server.events.derived_messages import derive_message
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
from server.events.quick_protobuf import QuickProtobufReader
from server.events.redaction import Redactor
from server.events.schema import MAX_BATCH_SIZE, Field, Kind, Schema
from server.protocols import GRPC

_READABLE_SHARE = 8


class ProtobufCodec:
    """Reads batches of events by one schema, with `quick` most of them in one go."""

    def __init__(
        self,
        schema: Schema,
        quick: QuickProtobufReader | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self._schema = schema
        self._quick = quick
        self._redactor = redactor
        self._texts = schema.of_kind(Kind.TEXT)
        self._objects = schema.of_kind(Kind.OBJECT)
        self._columns = ColumnReader(schema)
        self._loose_type = derive_message(Event, "loose", _loosen)
        # An event with repeated or unknown fields is smaller than what was sent; from this size on,
        # that is not looked at.
        self._readable_bytes = _READABLE_SHARE * schema.max_bytes
        self._too_large = report_excess(schema.max_bytes)

    def parse_batch(
        self, request: bytes, deadline: Deadline = NEVER, project_id: str | None = None
    ) -> ParsedBatch:
        """Return the events of an encoded IngestEventsRequest, each parsed when it is asked for.

        An event that is plainly valid for the project comes as its row, if a project is given.
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
        events: Iterator[ReadEvent] = map(self._parse_event, frames)
        if self._quick is not None and project_id is not None:
            events = self._parse_quickly(self._quick, frames, project_id)
        received: Callable[[int], bytes | None] = frames.__getitem__
        if (redactor := self._redactor) is not None:
            received = lambda index: redactor.redact_frame(frames[index])  # noqa: E731 - as the other
        return ParsedBatch(GRPC, len(frames), len(request), events, received)

    def _parse_quickly(
        self, quick: QuickProtobufReader, frames: Iterable[bytes], project_id: str
    ) -> Iterator[ReadEvent]:
        read = quick.read if self._redactor is None else partial(self._read_redacted, quick)
        for frame in frames:
            row = read(frame, project_id)
            yield row if row is not None else self._parse_event(frame)

    def _read_redacted(
        self, quick: QuickProtobufReader, frame: bytes, project_id: str
    ) -> Row | None:
        """Return the row of an event with everything redacted, or None as the quick way does."""
        if self._redactor is None or len(frame) > self._schema.max_bytes:
            return None
        redacted = self._redactor.redact_frame(frame)
        return None if redacted is None else quick.read(redacted, project_id)

    def _parse_event(self, encoded: bytes) -> ParsedEvent | MalformedEvent:
        if len(encoded) > self._readable_bytes:
            return MalformedEvent(Event(), 0, self._too_large)
        try:
            event = Event.FromString(encoded)
        except DecodeError:
            malformed = self._find_malformed(encoded)
            if self._redactor is not None:
                self._redactor.redact_message(malformed.event)
            return malformed
        max_bytes = self._schema.max_bytes
        is_too_large = len(encoded) > max_bytes and event.ByteSize() > max_bytes
        if self._redactor is not None:
            self._redactor.redact_message(event)
            encoded = event.SerializeToString()
        if is_too_large:
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


def _loosen(field: FieldDescriptorProto) -> None:
    """Make a text or message of bytes, which any bytes can be read as."""
    if field.type in (field.TYPE_STRING, field.TYPE_MESSAGE):
        field.type = field.TYPE_BYTES
        field.ClearField("type_name")
