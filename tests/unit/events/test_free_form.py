"""Free-form objects keep what they hold, as far as PostgreSQL can."""

import json
import math
from typing import Any

import pytest
from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value
from hypothesis import given
from hypothesis import strategies as st

from server.events.free_form import (
    LostDigits,
    TooDeep,
    are_plain,
    fill_struct,
    read_struct,
    replace_nul,
)
from server.events.json_parser import parse_exactly

DEPTH = 32

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
numbers = st.integers(-(2**53), 2**53) | st.floats(-1e18, 1e18)
scalars = st.none() | st.booleans() | texts | numbers
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def pass_through(source: dict[str, Any], depth: int = DEPTH) -> dict[str, Any]:
    """Return what becomes of a parsed JSON object on its way to the table, as protobuf."""
    struct = Struct()
    fill_struct(struct, source, depth + 1)
    return read_struct(Struct.FromString(struct.SerializeToString()), depth)


@given(st.dictionaries(texts, values, max_size=5))
def test_any_storable_json_object_survives(source: dict[str, Any]) -> None:
    """Any JSON object of storable texts and exact numbers comes back as it was."""
    assert pass_through(source) == source


@given(st.dictionaries(texts, values, max_size=5), st.integers(1, 6))
def test_plain_json_comes_back_and_nests_safely(source: dict[str, Any], depth: int) -> None:
    """What is called plain is, as JSON, what comes back; and nothing plain is nested too deep."""
    if depth > 0 and are_plain(source.values(), depth):
        struct = Struct()
        fill_struct(struct, source)
        returned = read_struct(struct, depth)
        assert json.dumps(returned, sort_keys=True) == json.dumps(source, sort_keys=True)


@pytest.mark.parametrize(
    ("digits", "stored"),
    [
        ("0", 0),
        ("-0.0", 0),
        ("7.0", 7),
        ("1e3", 1000),
        ("0.1", 0.1),
        ("5e-324", 5e-324),
        ("9007199254740992", 2**53),
        ("9007199254740993", "9007199254740993"),
        ("-9007199254740993", "-9007199254740993"),
        ("9007199254740994", 2**53 + 2),
        ("9223372036854775807", "9223372036854775807"),
        ("9223372036854775808", 2.0**63),
        ("18446744073709551615", "18446744073709551615"),
        ("18446744073709551616", 2.0**64),
        ("18446744073709551617", "18446744073709551617"),
        ("-123456789012345678901234567890", "-123456789012345678901234567890"),
        ("1" + "0" * 39 + "1", "1" + "0" * 39 + "1"),
        ("9" * 400, "9" * 400),
        ("9" * 5000, "9" * 5000),
        ("9007199254740993.0", 2**53),
        ("1e300", 1e300),
        ("1e400", None),
        ("-1e400", None),
    ],
)
def test_an_integer_without_a_double_becomes_text(digits: str, stored: Any) -> None:
    """Numbers are doubles; an integer that no double is equal to keeps its digits as a text."""
    result = pass_through(parse_exactly(b'{"n": %s}' % digits.encode()).value)["n"]
    assert (result, type(result)) == (stored, type(stored))


@pytest.mark.parametrize("number", [2.0**63, -(2.0**63), 1e300])
def test_a_float_with_lost_digits_asks_for_reparsing(number: float) -> None:
    """A float that may have been a long integer asks for a second, exact parsing."""
    with pytest.raises(LostDigits):
        pass_through({"list": [{"n": number}]})


@pytest.mark.parametrize(
    "value",
    [
        Value(),
        Value(null_value=NULL_VALUE),
        *(Value(number_value=number) for number in (math.nan, math.inf, -math.inf)),
    ],
    ids=lambda value: str(value).strip() or "empty",
)
def test_values_without_a_json_form_become_null(value: Value) -> None:
    """An empty Value and a number that is not finite become null, in objects and in arrays."""
    struct = Struct(fields={"v": value, "list": Value(list_value=ListValue(values=[value]))})
    assert read_struct(struct, DEPTH) == {"v": None, "list": [None]}


def test_nul_characters_become_replacement_characters() -> None:
    """U+0000, which PostgreSQL refuses, becomes U+FFFD in keys and in values."""
    struct = Struct()
    fill_struct(struct, {"a\0b": ["\0", {"\0": "x\0\0y"}]}, DEPTH)
    replace_nul(struct)
    assert read_struct(struct, DEPTH) == {"a\ufffdb": ["\ufffd", {"\ufffd": "x\ufffd\ufffdy"}]}


@pytest.mark.parametrize("value", ["", {}, [], False, 0, "0", [[]], [{}], {"": ""}], ids=repr)
def test_empty_and_zero_values_are_not_null(value: Any) -> None:
    """Empty and zero values stay what they are."""
    assert repr(pass_through({"v": value})) == repr({"v": value})


def nest(levels: int, pattern: str) -> dict[str, Any]:
    """Return an object with this many levels of `{` and `[`, in turns as in the pattern."""
    value: Any = "bottom"
    for level in range(levels - 1, 0, -1):
        value = {"k": value} if pattern[level % len(pattern)] == "{" else [value]
    return {"k": value}


@pytest.mark.parametrize("pattern", ["{", "[", "{[", "[{", "{{[", "[[{"])
def test_nesting_of_32_levels_survives(pattern: str) -> None:
    """32 levels of objects, arrays or a mix come back as they were."""
    source = nest(DEPTH, pattern)
    assert pass_through(source) == source


@pytest.mark.parametrize("levels", [DEPTH + 1, DEPTH + 2, 100, 900])
@pytest.mark.parametrize("pattern", ["{", "[", "{[", "[{", "{{[", "[[{"])
def test_nesting_of_33_levels_is_reported(levels: int, pattern: str) -> None:
    """33 levels and more of objects, arrays or a mix are told, not cut short in silence."""
    with pytest.raises(TooDeep):
        pass_through(nest(levels, pattern))
