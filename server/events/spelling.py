"""A received event for reading: JSON, protobuf's text format, or what can be read of them."""

import json

from google.protobuf import text_format
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from productgraph.v1.event_pb2 import Event
from server.protocols import HTTP


def spell_event(protocol: str, received: bytes) -> str:
    """Return the text of an event that was received over this protocol; it may be malformed."""
    return _spell_json(received) if protocol == HTTP else _spell_protobuf(received)


def _spell_json(received: bytes) -> str:
    text = received.decode(errors="replace")
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _spell_protobuf(received: bytes) -> str:
    # If a text is not UTF-8, the fields can still be shown by their numbers.
    for kind in (Event, Empty):
        try:
            message: Message = kind.FromString(received)
        except DecodeError:
            continue
        return text_format.MessageToString(message, as_utf8=True, print_unknown_fields=True)
    return received.hex(" ")
