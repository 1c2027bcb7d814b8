"""Free-form JSON objects as google.protobuf.Struct, and back.

Numbers are doubles here, as Struct's are: an integer that a double cannot hold exactly travels as
its decimal text, and a number that is not finite becomes null. U+0000, which PostgreSQL refuses,
becomes U+FFFD.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value

# From here on a float may stand for an integer whose digits the fast JSON parser has dropped, and
# the fast JSON writer takes no integers.
_INTEGERS_END = 2.0**63


# Stands for characters that PostgreSQL refuses.
REPLACEMENT = "\ufffd"


class ExactFloat(float):
    """A number that was written with a fraction or an exponent: no integer that lost digits."""


class LostDigits(Exception):
    """A number may have been an integer of more than 64 bits: parse again, exactly."""


class TooDeep(Exception):
    """Objects and arrays are nested deeper than allowed."""


def fill_struct(struct: Struct, source: Mapping[str, Any], depth: int) -> bool:
    """Adds the parsed JSON object `source` to `struct`.

    What is nested deeper than `depth` levels, `source` counted, is left out as null. Says whether
    `source` has fewer levels and is, written as JSON, what `read_struct` would give back. Raises
    LostDigits for a float that may have been an integer.
    """
    fields = struct.fields
    is_plain = depth > 1
    for key, item in source.items():
        if type(item) is str:
            fields[key].string_value = item
        elif not _set_value(fields[key], item, depth - 1):
            is_plain = False
    return is_plain


def _set_value(value: Value, item: Any, depth: int) -> bool:
    kind = type(item)
    if kind is str:
        value.string_value = item
    elif kind is bool:
        value.bool_value = item
    elif kind is int:
        return _set_integer(value, item)
    elif kind is float:
        return _set_float(value, item)
    elif kind is dict and depth > 0:
        value.struct_value.SetInParent()
        return fill_struct(value.struct_value, item, depth)
    elif kind is list and depth > 0:
        value.list_value.SetInParent()
        return _add_elements(value.list_value, item, depth)
    elif item is None:
        value.null_value = NULL_VALUE
    else:
        return _set_odd(value, item)
    return True


def _add_elements(values: ListValue, source: list[Any], depth: int) -> bool:
    is_plain = depth > 1
    for element in source:
        if not _set_value(values.values.add(), element, depth - 1):
            is_plain = False
    return is_plain


def _set_integer(value: Value, item: int) -> bool:
    if float(item) == item:
        value.number_value = item
        return abs(item) < _INTEGERS_END
    value.string_value = str(item)
    return False


def _set_float(value: Value, item: float) -> bool:
    if abs(item) >= _INTEGERS_END:
        raise LostDigits
    value.number_value = item
    return not item.is_integer()


def _set_odd(value: Value, item: Any) -> bool:
    """Sets what only the exact parser finds, or what is nested too deep."""
    if type(item) is ExactFloat and math.isfinite(item):
        value.number_value = item
    elif type(item) is Decimal:
        value.string_value = str(item)
    else:
        value.null_value = NULL_VALUE
    return False


def read_struct(struct: Struct, depth: int) -> dict[str, Any]:
    """The JSON object that `struct` holds; raises TooDeep where it has over `depth` levels."""
    if depth == 0:
        raise TooDeep
    fields = struct.fields
    return {key: _read_value(fields[key], depth) for key in fields}


def replace_nul(struct: Struct) -> None:
    """Replaces U+0000 in a struct's keys and texts, at any depth."""
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
        return _read_number(value.number_value)
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


def _read_number(number: float) -> int | float | None:
    if number.is_integer() and abs(number) < _INTEGERS_END:
        return int(number)
    return number if math.isfinite(number) else None
