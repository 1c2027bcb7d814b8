"""JSON text to Python values, with one odd value never failing the whole document.

orjson reads nearly all documents. It refuses one for a lone surrogate, a number beyond a double,
too much nesting or bytes that are not UTF-8, and drops digits of long integers: such documents are
read by the standard library, pruned of what is nested too deep for any event.

Both make an object of each value, so that a body of 10 MB could take seconds and hundreds of
megabytes: a body of too many values is refused before, which takes neither.
"""

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from typing import Any, AnyStr, NamedTuple, NoReturn

import orjson

from server.deadline import NEVER, Deadline
from server.errors import InvalidArgument
from server.events.free_form import REPLACEMENT, ExactFloat
from server.events.problems import NOT_UTF8

# Five times as many as in a full batch of large events.
MAX_VALUES = 500_000
# What the dearest values take until the first event is read, and bodies so small that they are not
# looked at for it.
_SECONDS_PER_BYTE, _SECONDS_PER_VALUE = 2e-8, 5e-6
_QUICK_BYTES = 64 * 1024
# How many steps of a search through a body are taken between looks at the clock.
_STEPS_PER_CHECK = 4096
# Deeper than any valid event reaches, so that what is cut stays recognisable as too deep.
_PRUNED_DEPTH = 64
# A text, closed or not. Possessive, so that no input makes it backtrack.
_TEXT = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
# Up to the next bracket, or the next sign that a value follows, outside texts; or to the end.
_BRACKET = re.compile(rf'[^"\[\]{{}}]*+(?:{_TEXT}[^"\[\]{{}}]*+)*+(?:([\[\]{{}}])|\Z)', re.DOTALL)
_VALUE = re.compile(rf'[^",\[{{]*+(?:{_TEXT}[^",\[{{]*+)*+(?:([,\[{{])|\Z)'.encode(), re.DOTALL)
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# What orjson refuses although it is JSON: surrogates, long integers and large exponents.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_LONG_DIGITS = re.compile(r"\d{300,}+(?![.eE])", re.ASCII)
_LARGE_EXPONENT = re.compile(r"(?<=[eE])[+-]?\d{3,}", re.ASCII)
_SPACES = re.compile(r"\s*")
_NO_NUMBER = re.compile(r"NaN|Infinity")
# The place of an error whose place is not known.
_NOWHERE = -1
# int() takes time quadratic in the number of digits, Decimal() does not.
_LONGEST_INT = 40


class Document(NamedTuple):
    """A parsed document.

    In `value`, what PostgreSQL cannot store is U+FFFD, and a text that is not UTF-8 is the fault of
    that; `raw` has every text as it was sent. `damage` says where the first byte is that is not
    UTF-8.
    """

    value: Any
    raw: Any
    damage: str = ""


def check_values(body: bytes, deadline: Deadline) -> None:
    """Raise InvalidArgument for a body of too many values, Unavailable for one that takes too long.

    Values are counted only if there might be too many, or too many for the time that is left.
    """
    if len(body) <= _QUICK_BYTES:
        deadline.check()
        return
    most = len(body) // 2  # a value takes two characters, counting the one before or behind it
    if most > MAX_VALUES or _estimate_seconds(body, most) >= deadline.left():
        most = body.count(b",") + body.count(b"[") + body.count(b"{")
    deadline.check(_estimate_seconds(body, most))
    if most > MAX_VALUES and _count_outside_texts(body, deadline) > MAX_VALUES:
        raise InvalidArgument(f"body: more than {MAX_VALUES} values")


def _estimate_seconds(body: bytes, values: int) -> float:
    return len(body) * _SECONDS_PER_BYTE + min(values, MAX_VALUES) * _SECONDS_PER_VALUE


def _count_outside_texts(body: bytes, deadline: Deadline) -> int:
    """Count values up to one more than allowed."""
    found = _search(_VALUE, body, deadline)
    return sum(1 for each in islice(found, MAX_VALUES + 1) if each.lastindex)


def _search(
    pattern: re.Pattern[AnyStr], text: AnyStr, deadline: Deadline
) -> Iterator[re.Match[AnyStr]]:
    """Find all matches, while there is time."""
    for number, match in enumerate(pattern.finditer(text)):
        if number % _STEPS_PER_CHECK == 0:
            deadline.check()
        yield match


def parse_document(body: bytes, deadline: Deadline = NEVER) -> Document:
    """Return the document in `body`, at the speed of orjson if possible.

    Integers of more than 64 bits come as floats. Raises InvalidArgument for invalid JSON, and
    Unavailable if it takes too long to tell.
    """
    if b"\\" in body and rb"\u0000" in body:  # finding one byte is what takes no time
        return parse_exactly(body, deadline)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return parse_exactly(body, deadline)
    return Document(value, value)


def parse_exactly(body: bytes, deadline: Deadline = NEVER) -> Document:
    """Return the document in `body` with the digits of every integer.

    Integers come as int or Decimal, other numbers as ExactFloat, infinite ones included.
    """
    try:
        raw = _load(body.decode(), deadline)
    except UnicodeDecodeError:
        return _parse_damaged(body, deadline)
    return Document(_make_storable(raw), raw)


def _parse_damaged(body: bytes, deadline: Deadline) -> Document:
    """Read a body with bytes that are not UTF-8, each of which is a surrogate or a question mark.

    A client can have sent either, but what differs between the two is not UTF-8.
    """
    text = body.decode("utf-8", "surrogateescape")
    raw = _load(text, deadline)
    other = _load(text.encode("utf-8", "replace").decode(), deadline)
    first = next(_SURROGATE.finditer(text))
    damage = _describe_place(text, first.start(), _describe_byte(first[0]))
    return Document(_make_storable(_mark_differences(raw, other)), raw, damage)


def _mark_differences(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict) and len(one) == len(other):
        pairs = zip(one.items(), other.items(), strict=True)
        return {
            name: _mark_differences(value, second) if name == other_name else NOT_UTF8
            for (name, value), (other_name, second) in pairs
        }
    if isinstance(one, list) and isinstance(other, list):
        return [_mark_differences(*pair) for pair in zip(one, other, strict=True)]
    return one if one == other else NOT_UTF8


def _load(text: str, deadline: Deadline) -> Any:
    pruned = _prune(text, deadline)
    try:
        return json.loads(
            pruned,
            parse_int=lambda digits: (int if len(digits) <= _LONGEST_INT else Decimal)(digits),
            parse_float=ExactFloat,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise InvalidArgument(_explain_invalid(text, pruned, error)) from None


def _refuse_constant(name: str) -> NoReturn:
    raise json.JSONDecodeError(name, "", _NOWHERE)


def _explain_invalid(text: str, pruned: str, error: json.JSONDecodeError) -> str:
    """Say where the text is not JSON, and why, by orjson: its places are the same on any Python."""
    # What comes behind the error does not matter, but a text without an end has it at the end.
    is_open = error.pos == _NOWHERE or error.msg.startswith("Unterminated")
    behind = None if is_open else _SPACES.match(pruned, error.pos + 1)
    end = behind.end() + 10 if behind else None
    try:
        orjson.loads(_make_usual(pruned[:end]).encode("utf-8", "replace"))
    except orjson.JSONDecodeError as refused:
        place, what = refused.pos, refused.msg
        if name := _NO_NUMBER.match(text, place):
            what = f"{name[0]} is not a JSON value"
        elif _SURROGATE.match(text, place):
            what = _describe_byte(text[place])
        return _describe_place(text, place, what)
    return "body: invalid JSON"


def _make_usual(text: str) -> str:
    """Replace what orjson refuses although it is JSON by something as long that it takes."""
    text = _SURROGATE_ESCAPE.sub(r"\\u0020", text)
    text = _LARGE_EXPONENT.sub(lambda found: "0" * len(found[0]), text)
    return _LONG_DIGITS.sub(_shorten_digits, text)


def _shorten_digits(digits: re.Match[str]) -> str:
    follows_point = digits.string[digits.start() - 1 : digits.start()] == "."
    return ("0" if follows_point else "0.").ljust(len(digits[0]), "0")


def _describe_place(text: str, position: int, what: str) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"body: invalid JSON at line {line}, column {column}: {what}"


def _describe_byte(surrogate: str) -> str:
    return f"byte 0x{ord(surrogate) & 0xFF:02x} is not UTF-8"


def _prune(text: str, deadline: Deadline) -> str:
    """Return the text with each array or object nested too deep replaced by null, equally long."""
    if text.count("[") + text.count("{") < _PRUNED_DEPTH:
        return text
    return "".join(_prune_parts(text, deadline))


def _prune_parts(text: str, deadline: Deadline) -> Iterator[str]:
    depth = kept_to = 0
    for match in _search(_BRACKET, text, deadline):
        bracket, end = match[1], match.end()
        if depth < 0 or not bracket:
            break
        if bracket in "[{":
            depth += 1
            if depth == _PRUNED_DEPTH:
                yield text[kept_to : end - 1]
                kept_to = end - 1
        else:
            if depth == _PRUNED_DEPTH:
                cut = text[kept_to:end]
                yield "null".ljust(len(cut)) if len(cut) > len("null") else cut
                kept_to = end
            depth -= 1
    yield text[kept_to:] if depth < _PRUNED_DEPTH else " " * (len(text) - kept_to)


def encode_document(document: Any) -> bytes:
    """Write a parsed document as JSON, with the digits and surrogates that it had when parsed.

    What is nested deeper than any valid event reaches becomes null.
    """
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError:
        return orjson.dumps(_spell_out(document, _PRUNED_DEPTH))


def _spell_out(value: Any, depth: int) -> Any:
    """Return the value with everything written out that orjson would refuse to write."""
    if isinstance(value, dict | list) and depth == 0:
        return None
    if isinstance(value, dict):
        return {_spell_text(name): _spell_out(item, depth - 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_spell_out(item, depth - 1) for item in value]
    if isinstance(value, str):
        return _spell_text(value)
    if isinstance(value, float):
        return _spell_float(value)
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return orjson.Fragment(str(value))
    return value


def _spell_text(text: str) -> str:
    """Replace each lone surrogate by U+0000, whose escape is as long as that of the surrogate."""
    return _SURROGATE.sub("\0", text)


def _spell_float(number: float) -> object:
    if math.isinf(number):
        return orjson.Fragment("1e999" if number > 0 else "-1e999")
    return float(number)  # a plain one, which orjson writes itself


def _make_storable(value: Any, depth: int = _PRUNED_DEPTH) -> Any:
    if isinstance(value, str):
        return _UNSTORABLE.sub(REPLACEMENT, value)
    if isinstance(value, list | dict) and depth == 1:
        return None
    if isinstance(value, list):
        return [_make_storable(element, depth - 1) for element in value]
    if isinstance(value, dict):
        pairs = value.items()
        return {_make_storable(name): _make_storable(item, depth - 1) for name, item in pairs}
    return value
