"""Free-form JSON objects as google.protobuf.Struct, and back.

Numbers are doubles here, as Struct's are: an integer that a double cannot hold exactly travels as
its decimal text, and a number that is not finite becomes null. U+0000, which PostgreSQL refuses,
becomes U+FFFD.
"""

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value

from server.events.problems import NOT_UTF8, InvalidValue

# From here on a float may stand for an integer whose digits the fast JSON parser has dropped, and
# the fast JSON writer takes no integers.
_INTEGERS_END = 2.0**63
# Up to here a double holds every integer.
_EXACT_END = 1 << 53


# Stands for characters that PostgreSQL refuses.
REPLACEMENT = "\ufffd"


class ExactFloat(float):
    """A number that was written with a fraction or an exponent: no integer that lost digits."""


class LostDigits(Exception):
    """A number may have been an integer of more than 64 bits: parse again, exactly."""


class TooDeep(Exception):
    """Objects and arrays are nested deeper than allowed."""


def are_plain(items: Iterable[Any], depth: int) -> bool:
    """Tell whether a Struct would give back these items of a JSON object or array as they are.

    With the object or array, they must have at most `depth` levels.
    """
    for item in items:
        kind = type(item)
        if kind is str or kind is bool or item is None:
            continue
        if kind is int:
            if not -_EXACT_END <= item <= _EXACT_END and (
                float(item) != item or abs(item) >= _INTEGERS_END
            ):
                return False
        elif kind is float:
            if item.is_integer():
                return False
        elif kind is dict or kind is list:
            inner = item.values() if kind is dict else item
            if depth <= 1 or not are_plain(inner, depth - 1):
                return False
        else:
            return False
    return True


def fill_struct(struct: Struct, source: Mapping[str, Any], depth: float = math.inf) -> None:
    """Add the parsed JSON object `source` to `struct`, which is then present.

    What is nested deeper than `depth` levels, counting `source`, becomes null. Raises LostDigits
    for a float that may have been an integer, and InvalidValue for a text that is not UTF-8.
    """
    struct.SetInParent()
    fields = struct.fields
    for key, item in source.items():
        _set_value(fields[key], item, depth - 1)


def _set_value(value: Value, item: Any, depth: float) -> None:
    kind = type(item)
    if kind is str:
        value.string_value = item
    elif kind is bool:
        value.bool_value = item
    elif kind is int:
        _set_integer(value, item)
    elif kind is float:
        _set_float(value, item)
    elif kind is dict and depth > 0:
        fill_struct(value.struct_value, item, depth)
    elif kind is list and depth > 0:
        value.list_value.SetInParent()
        for element in item:
            _set_value(value.list_value.values.add(), element, depth - 1)
    elif item is None:
        value.null_value = NULL_VALUE
    else:
        _set_odd(value, item)


def _set_integer(value: Value, item: int) -> None:
    if float(item) == item:
        value.number_value = item
    else:
        value.string_value = str(item)


def _set_float(value: Value, item: float) -> None:
    if abs(item) >= _INTEGERS_END:
        raise LostDigits
    value.number_value = item


def _set_odd(value: Value, item: Any) -> None:
    """Set what only the exact parser finds, or what is nested too deep."""
    if item is NOT_UTF8:
        raise InvalidValue(NOT_UTF8)
    if type(item) is ExactFloat and math.isfinite(item):
        value.number_value = item
    elif type(item) is Decimal:
        value.string_value = str(item)
    else:
        value.null_value = NULL_VALUE


def read_struct(struct: Struct, depth: int) -> dict[str, Any]:
    """Return the JSON object that `struct` holds. Raises TooDeep beyond `depth` levels."""
    if depth == 0:
        raise TooDeep
    fields = struct.fields
    return {key: _read_value(fields[key], depth) for key in fields}


def replace_nul(struct: Struct) -> None:
    """Replace U+0000 in a struct's keys and texts, at any depth."""
    fields = struct.fields
    for key in [key for key in fields if "\0" in key]:
        fields[key.replace("\0", REPLACEMENT)].CopyFrom(fields[key])
        del fields[key]
    for key in fields:
        _replace_nul(fields[key])


def _replace_nul(value: Value) -> None:
    if "\0" in (text := value.string_value):
        value.string_value = text.replace("\0", REPLACEMENT)
    elif value.HasField("struct_value"):
        replace_nul(value.struct_value)
    elif value.HasField("list_value"):
        for element in value.list_value.values:
            _replace_nul(element)


def _read_value(value: Value, depth: int) -> Any:
    if text := value.string_value:
        return text
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        return read_number(value.number_value)
    if kind == "bool_value":
        return value.bool_value
    if kind == "struct_value":
        return read_struct(value.struct_value, depth - 1)
    if kind == "list_value":
        return _read_list(value.list_value, depth - 1)
    return "" if kind == "string_value" else None


def _read_list(values: ListValue, depth: int) -> list[Any]:
    if depth == 0:
        raise TooDeep
    return [_read_value(value, depth) for value in values.values]


def read_number(number: float) -> int | float | None:
    """Return the JSON number that a double stands for; null for one that is not finite."""
    if number.is_integer() and abs(number) < _INTEGERS_END:
        return int(number)
    return number if math.isfinite(number) else None
