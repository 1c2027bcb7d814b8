"""JSON is read as far as it can be, and where it cannot, the answer says where and why."""

import json
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidArgument
from server.events.json_codec import JsonCodec
from server.events.json_parser import encode_document, parse_document, parse_exactly
from server.events.parsed import MalformedEvent, ParsedEvent
from server.events.schema import EVENT_SCHEMA

CODEC = JsonCodec(EVENT_SCHEMA)
DEEP = b'"' + b"[" * 9 + b'", ' + b"[" * 99 + b"]" * 99


def explain(body: bytes) -> str:
    """Return the text with which a body is refused."""
    with pytest.raises(InvalidArgument) as caught:
        CODEC.parse_batch(body)
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "line", "column", "what"),
    [
        (b'{"events": [', 1, 13, "unexpected end of data"),
        (b'{"events": [{"x": NaN}]}', 1, 19, "NaN is not a JSON value"),
        (b'{"events": [{"x": -Infinity}]}', 1, 20, "Infinity is not a JSON value"),
        (b'{\n "events": [],\n}', 2, 14, "trailing comma is not allowed"),
        (b'{"events": [],        }', 1, 14, "trailing comma is not allowed"),
        ('{"é": "漢",\n\n "b" 1}'.encode(), 3, 6, "unexpected character, expected ':' after key"),
        (b"{'events': []}", 1, 2, "unexpected character"),
        (b'{"events": []} x', 1, 16, "unexpected content after document"),
        (b'{"events": [{"x": "\\ud83d"}, nul]}', 1, 30, "invalid literal, expected 'null'"),
        (b'{"a": 1e999, "b": "\\ud83d", "c": }', 1, 34, "unexpected character"),
        (b'{"a": ' + b"7" * 400 + b', "b": -}', 1, 415, "no digit after sign"),
        (b'{"a": [' + DEEP + b"], oops}", 1, 222, "unexpected character"),
        (b'{"a": [' + DEEP + b', "open', 1, 226, "unexpected end of data"),
        (b'{"a": ' + b"[" * 70 + b"\n" + b"[" * 70, 2, 71, "unexpected end of data"),
        (b'{"x": "\n"}', 1, 8, "unexpected control character in string"),
        (b'{"x": 01}', 1, 7, "number with leading zero is not allowed"),
        (b'\xef\xbb\xbf{"x": tru}', 1, 7, "invalid literal, expected 'true'"),
        (b"\xff\xfe{\0}\0", 1, 1, "byte 0xff is not UTF-8"),
        (b'{"events": [\x80]}', 1, 13, "byte 0x80 is not UTF-8"),
        (b'{"\xe9": 1, "events": []}', 1, 3, "byte 0xe9 is not UTF-8"),
        (b'{"events": [], "sent": ["x", "\xc3"]}', 1, 31, "byte 0xc3 is not UTF-8"),
        (b'["\xff"]', 1, 3, "byte 0xff is not UTF-8"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_invalid_json_is_refused_with_its_place(
    body: bytes, line: int, column: int, what: str
) -> None:
    """The answer to what is not JSON has line, column and reason, whatever odd things precede."""
    assert explain(body).startswith(f"body: invalid JSON at line {line}, column {column}: {what}")


def test_a_byte_order_mark_is_skipped() -> None:
    """Bodies may begin with the mark of UTF-8."""
    assert CODEC.parse_batch(b'\xef\xbb\xbf{"events": [{}, {}]}').count == 2


REQUIRED = b'"event_id": "e", "project_id": "p", "session.id": "s", "event.type": "custom"'


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (b'{"event_id": "\xff"}', "event_id: must be valid UTF-8"),
        (b'{"page.title": "a\xc3"}', "page.title: must be valid UTF-8"),
        (b'{"page.title": "\\udc80 \xff"}', "page.title: must be valid UTF-8"),
        (b'{"metadata": {"a": ["\xff"]}}', "metadata: must be valid UTF-8"),
        (b'{"metadata": {"\xff": 1}}', "metadata: must be valid UTF-8"),
        (b'{"org.id": "\xff"}', "attributes: must be valid UTF-8"),
        (b'{"\xff": 1, "org.id": "x"}', "attributes: must be valid UTF-8"),
        (b'{"\xff": 1, "?": 2}', "event: must be valid UTF-8"),
        (b'"\xff"', "event: must be valid UTF-8"),
        (b'{"duration_ms": "\xff"}', "duration_ms: must be valid UTF-8"),
    ],
    ids=repr,
)
def test_bytes_that_are_not_utf8_reject_their_event_alone(event: bytes, error: str) -> None:
    """An event is rejected for such bytes in it, by its field, and its neighbours are read."""
    good = b"{" + REQUIRED + b', "page.title": "\\udc80?"}'
    batch = CODEC.parse_batch(b'{"events": [' + good + b"," + event + b"," + good + b"]}")
    before, bad, behind = batch.events
    assert isinstance(bad, MalformedEvent)
    assert str(bad.problem) == error
    assert before == behind
    assert isinstance(before, ParsedEvent)
    assert before.event.page_title == "\ufffd?"


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_a_document_has_one_size_by_both_parsers(value: Any) -> None:
    """What was parsed takes as many bytes as JSON, whichever parser has read it."""
    body = json.dumps(value).encode()
    exact = encode_document(parse_exactly(body).raw)
    if all(abs(number) < 2**63 for number in find_integers(value)):
        assert encode_document(parse_document(body).raw) == exact == orjson.dumps(value)


def find_integers(value: Any) -> list[int]:
    """Return the integers in a document."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in find_integers(item)]
    if isinstance(value, list):
        return [number for item in value for number in find_integers(item)]
    return [value] if isinstance(value, int) else []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ('"\\u0000"', 8),
        ('"\\ud83d"', 8),
        ('"\\ufffd"', 5),
        ('"\\u001f\\n\\""', 12),
        ("123456789012345678901234567890", 30),
        ("1e3", 6),
        ("1e15", 18),
        ("[1, 2, 3]", 7),
    ],
)
def test_size_is_that_of_what_was_sent(text: str, size: int) -> None:
    """An event is measured before anything in it is replaced or rounded."""
    batch = CODEC.parse_batch(b'{"events": [{"x": %s}]}' % text.encode())
    assert len(batch.received(0) or b"") == size + len('{"x":}')


@pytest.mark.parametrize("number", [b"9e99", b"1e999", b"12345678901234567890123"])
def test_writing_exact_numbers_takes_little_memory(number: bytes) -> None:
    """Writing a document of numbers with all digits takes 500 bytes a number at most."""
    document = parse_exactly(b"[" + b",".join([number] * 10_000) + b"]").raw
    tracemalloc.start()
    try:
        encode_document(document)
        assert tracemalloc.get_traced_memory()[1] < 500 * 10_000
    finally:
        tracemalloc.stop()
