"""JSON text to Python values, with one odd value never failing the whole document.

orjson reads nearly all of them. It refuses a document for a lone surrogate, a number beyond a
double or too much nesting, and drops digits of long integers: such documents are read by the
standard library, pruned of what is nested too deep for any event.

Both make an object of each value, so that a body of 10 MB could take seconds and hundreds of
megabytes: how many values there are is counted first, which takes neither.
"""

import json
import math
import re
from decimal import Decimal
from typing import Any, NoReturn

import orjson

from server.deadline import NEVER, Deadline
from server.errors import InvalidArgument
from server.events.free_form import ExactFloat

# Five times as many as in a full batch of large events.
MAX_VALUES = 500_000
# What the dearest values take until the first event is read, and bodies so small that they are not
# looked at for it.
_SECONDS_PER_BYTE, _SECONDS_PER_VALUE = 2e-8, 5e-6
_QUICK_BYTES = 64 * 1024
# A body can have millions of texts: whether there is time left is asked now and then.
_MATCHES_PER_CHECK = 4096
# Deeper than any valid event reaches, so that what is cut stays recognisable as too deep.
_PRUNED_DEPTH = 64
# A string, closed or not, or a bracket. Possessive, so that no input makes it backtrack.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
# int() takes time quadratic in the number of digits, Decimal() does not.
_LONGEST_INT = 40


def estimate_seconds(body: bytes, left: float) -> float:
    """How long it takes at the worst until a body is parsed, on a machine that is busy.

    Its values are counted only where it might be more than what is `left`.
    """
    if len(body) <= _QUICK_BYTES:
        return 0.0
    longest = _estimate(body, len(body) // 2)  # a value takes two characters at least
    return longest if longest < left else _estimate(body, count_values(body))


def _estimate(body: bytes, values: int) -> float:
    return len(body) * _SECONDS_PER_BYTE + min(values, MAX_VALUES) * _SECONDS_PER_VALUE


def parse_document(body: bytes, deadline: Deadline = NEVER) -> Any:
    """Return the document in `body`, at the speed of orjson if possible.

    Integers of more than 64 bits come as floats. Raises InvalidArgument for invalid JSON, and for
    too many values, and Unavailable where it takes too long to tell.
    """
    if _has_too_many_values(body, deadline):
        raise InvalidArgument(f"body: more than {MAX_VALUES} values")
    if b"\\" in body and rb"\u0000" in body:  # finding one byte is what takes no time
        return parse_exactly(body, deadline)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return parse_exactly(body, deadline)


def parse_exactly(body: bytes, deadline: Deadline = NEVER) -> Any:
    """Return the document in `body` with the digits of every integer.

    Integers come as int or Decimal, other numbers as ExactFloat, infinite ones included. U+0000 and
    lone surrogates come as U+FFFD. Raises InvalidArgument for invalid JSON.
    """
    try:
        text = body.decode()
        try:
            document = _load(text)
        except RecursionError:
            # Only now: this takes long, and what is no JSON has been refused.
            document = _load(_prune(text, deadline))
    except ValueError:
        raise InvalidArgument("body: invalid JSON") from None
    return _make_storable(document)


def _load(text: str) -> Any:
    return json.loads(
        text,
        parse_int=lambda digits: (int if len(digits) <= _LONGEST_INT else Decimal)(digits),
        parse_float=ExactFloat,
        parse_constant=_refuse_constant,
    )


def _has_too_many_values(body: bytes, deadline: Deadline) -> bool:
    # A value takes two characters at least, the one before or behind it counted.
    if len(body) <= 2 * MAX_VALUES or count_values(body) <= MAX_VALUES:
        return False
    # Those within texts are none. One gap between texts after the other, to hold nothing.
    count = position = 0
    for number, text in enumerate(_STRING.finditer(body)):
        if number % _MATCHES_PER_CHECK == 0:
            deadline.check()
        count += count_values(body[position : text.start()])
        if count > MAX_VALUES:
            return True
        position = text.end()
    return count + count_values(body[position:]) > MAX_VALUES


def count_values(text: bytes) -> int:
    """How many values there are at the most: one where anything opens, one behind each comma."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _prune(text: str, deadline: Deadline) -> str:
    """Return the text with each array or object nested too deep replaced by null."""
    kept: list[str] = []
    depth = resume = 0
    for number, match in enumerate(_TOKEN.finditer(text)):
        if number % _MATCHES_PER_CHECK == 0:
            deadline.check()
        bracket = text[match.start()]
        if bracket in "[{":
            depth += 1
            if depth == _PRUNED_DEPTH:
                kept += text[resume : match.start()], "null"
                resume = len(text)
        elif bracket in "]}":
            if depth == _PRUNED_DEPTH:
                resume = match.end()
            depth -= 1
    return "".join(kept) + text[resume:] if kept else text


def encode_document(document: Any) -> bytes:
    """Return a parsed document as JSON, with the digits that it had when parsed.

    What is nested deeper than any valid event reaches becomes null.
    """
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError:
        return orjson.dumps(_spell_out(document, _PRUNED_DEPTH))


def _spell_out(value: Any, depth: int) -> Any:
    """Return the value with every number in the digits that orjson would refuse to write."""
    if isinstance(value, dict | list) and depth == 0:
        return None
    if isinstance(value, dict):
        return {key: _spell_out(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_spell_out(item, depth - 1) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return orjson.Fragment("1e999" if value > 0 else "-1e999")
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return orjson.Fragment(str(value))
    return value


def _make_storable(value: Any, depth: int = _PRUNED_DEPTH) -> Any:
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, list | dict) and depth == 1:
        return None
    if isinstance(value, list):
        return [_make_storable(element, depth - 1) for element in value]
    if isinstance(value, dict):
        return {_make_storable(key): _make_storable(item, depth - 1) for key, item in value.items()}
    return value
