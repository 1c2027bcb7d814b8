"""Rates, as settings and commands write them."""

import re
from collections.abc import Mapping

# A rate of this value does not limit anything.
OFF = 0
_HIGHEST = 1_000_000_000
_UNIT_BYTES = {"": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3}
_LOWEST_BYTES = 1024


def parse_event_rate(text: str) -> int:
    """Return events a second, or OFF. Raises ValueError with the problem."""
    rate = _parse(text, {"": 1})
    if rate is None or rate > _HIGHEST:
        raise ValueError(f"must be off or events a second, from 1 to {_HIGHEST}, is {text!r}")
    return rate


def parse_byte_rate(text: str) -> int:
    """Return bytes a second, or OFF. Raises ValueError with the problem."""
    rate = _parse(text, _UNIT_BYTES)
    if rate is None or (rate != OFF and not _LOWEST_BYTES <= rate <= _HIGHEST):
        raise ValueError(f"must be off or bytes a second such as 5MB, 1KB at least, is {text!r}")
    return rate


def _parse(text: str, units: Mapping[str, int]) -> int | None:
    if text.lower() == "off":
        return OFF
    match = re.fullmatch(r"([1-9][0-9]{0,9})([KMG]B)?", text.upper(), re.ASCII)
    if match is None or (match[2] or "") not in units:
        return None
    return int(match[1]) * units[match[2] or ""]


def format_event_rate(rate: int | None) -> str:
    """Return the text of a rate; `-` for the default."""
    return "-" if rate is None else str(rate) if rate else "off"


def format_byte_rate(rate: int | None) -> str:
    """Return the text of a rate in the largest unit that is exact; `-` for the default."""
    if not rate:
        return format_event_rate(rate)
    size, unit = max((size, unit) for unit, size in _UNIT_BYTES.items() if rate % size == 0)
    return f"{rate // size}{unit}"
