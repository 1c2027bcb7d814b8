"""The ids of an event can be read from each of its forms."""

import json

import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st

from productgraph.v1.event_pb2 import Event
from server.events.persons import ANONYMOUS_ID, EventIds, Person, RowIds, hide_ids, read_ids
from server.protocols import GRPC, HTTP
from tests.support.events import ENCODER, encode_message, make_message

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)


@given(TEXT, TEXT, TEXT)
def test_ids_are_the_same_in_every_form(user: str, anonymous: str, other: str) -> None:
    """Rows, protobuf and JSON of an event tell the same ids, whatever characters they have."""
    message = make_message("p", "e", user_id=user, page_title=other)
    message.metadata[ANONYMOUS_ID] = other
    message.attributes[ANONYMOUS_ID] = anonymous
    wanted = EventIds(user, anonymous)
    assert RowIds(ENCODER.columns).read(encode_message(message)) == wanted
    assert read_ids(GRPC, message.SerializeToString()) == wanted
    sent = {"user.id": user, ANONYMOUS_ID: anonymous}
    assert read_ids(HTTP, json.dumps(sent).encode()) == wanted
    assert read_ids(HTTP, json.dumps({"user.id": user, "attributes": sent}).encode()) == wanted


@pytest.mark.parametrize("number", [4711, 4711.0])
def test_an_id_sent_as_number_counts_as_its_text(number: float) -> None:
    """An id that was sent as a number is the text of that number, in every form."""
    message = make_message("p", "e")
    message.attributes[ANONYMOUS_ID] = number
    wanted = EventIds("", "4711")
    assert RowIds(ENCODER.columns).read(encode_message(message)) == wanted
    assert read_ids(GRPC, message.SerializeToString()) == wanted
    assert read_ids(HTTP, json.dumps({ANONYMOUS_ID: number}).encode()) == wanted
    assert Person("p", None, ("4711",)).may_own(message.SerializeToString())


def test_ids_of_malformed_events_are_read_if_possible() -> None:
    """Of a malformed event the ids are read that can be; what cannot is neither his nor not."""
    first, second = Struct(), Struct()
    first.update({"x": 1})
    second.update({ANONYMOUS_ID: "a"})
    parts = b"".join(Event(attributes=part).SerializeToString() for part in (first, second))
    assert read_ids(GRPC, parts) == EventIds("", "a")
    no_utf8 = Event(user_id="u").SerializeToString() + b"\x1a\x01\xff"
    assert read_ids(GRPC, no_utf8) == EventIds("u", "")
    no_struct = Event(user_id="u").SerializeToString() + b"\x92\x02\x01\xff"
    assert read_ids(GRPC, no_struct) == EventIds("u", None)
    assert Person("p", "other").owns(read_ids(GRPC, no_struct)) is False
    assert Person("p", "other", ("a",)).owns(read_ids(GRPC, no_struct)) is None
    assert Person("p", "u", ("a",)).owns(read_ids(GRPC, no_struct)) is True


def test_short_ids_are_hidden_between_quotes_alone() -> None:
    """A short id may be a part of any word: it is hidden only as a whole text of JSON."""
    person = Person("p", "4", ("größe-12345",))
    answer = json.dumps({"code": 404, "users": ["4", "größe-12345"]}) + " for größe-12345"
    hidden = '{"code": 404, "users": ["…", "…"]} for …'
    assert hide_ids(answer, person) == hidden
