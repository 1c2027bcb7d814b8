"""Date-times: read from JSON, truncated to what the table holds, written for COPY."""

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from google.protobuf.timestamp_pb2 import Timestamp

# RFC 3339 (section 5.6) with a space allowed for the T, and seconds, fraction and offset optional.
_DATE_TIME = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ](?:[01]\d|2[0-3]):[0-5]\d"
    r"(?::(?:[0-5]\d|(60))(?:\.(\d+))?)?"
    r"(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)?",
    re.ASCII,
)
# What may follow the seconds in UTC; nothing long, since it is remembered.
_UTC_FRACTION = re.compile(r"(?:\.(\d{1,9}))?[Zz]?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# 0001-01-01T00:00:00Z and the end of 9999, in seconds of the Unix epoch.
FIRST_SECOND, END_SECOND = -62_135_596_800, 253_402_300_800


def parse_timestamp(text: str) -> tuple[int, int]:
    """The seconds of the Unix epoch and the nanoseconds of a date-time.

    Digits after the ninth of a fraction are cut; second 60 is the first of the next minute. Raises
    ValueError for anything else, dates that do not exist included; the years are not limited here.
    """
    try:
        return _parse_second(text[:19]), _parse_fraction(text[19:])
    except ValueError:
        return _parse_any(text)


# Events of a batch tend to share their seconds, and clients write no more than milliseconds: what
# was worked out for one is remembered.
@lru_cache(maxsize=4096)
def _parse_second(text: str) -> int:
    if len(text) != 19:  # up to the seconds, which only a full date-time has in so many characters
        raise ValueError(text)
    return _parse_any(text)[0]


@lru_cache(maxsize=4096)
def _parse_fraction(text: str) -> int:
    match = _UTC_FRACTION.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return int((match[1] or "").ljust(9, "0"))


def _parse_any(text: str) -> tuple[int, int]:
    match = _DATE_TIME.fullmatch(text)
    if match is None:
        raise ValueError(text)
    if match[1]:
        seconds, nanos = _parse_any(f"{text[:17]}59{text[19:]}")
        return seconds + 1, nanos
    # The letters are upper case for fromisoformat; a text that matches has no others.
    moment = datetime.fromisoformat(text.upper())
    elapsed = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    nanos = elapsed.microseconds * 1000
    if match[2] and len(match[2]) > 6:  # where datetime cuts them
        nanos = int(match[2][:9].ljust(9, "0"))
    return elapsed.days * 86_400 + elapsed.seconds, nanos


def is_storable(timestamp: Timestamp) -> bool:
    """Whether the timestamp is well-formed and falls within the years 1 to 9999."""
    return FIRST_SECOND <= timestamp.seconds < END_SECOND and 0 <= timestamp.nanos < 1_000_000_000


def truncate_timestamp(timestamp: Timestamp) -> None:
    """Cuts a timestamp to whole microseconds, which is what PostgreSQL can hold."""
    if excess := timestamp.nanos % 1000:
        timestamp.nanos -= excess


def count_microseconds(timestamp: Timestamp) -> int:
    """Return the whole microseconds from 1970 to a timestamp."""
    return timestamp.seconds * 1_000_000 + timestamp.nanos // 1000


def format_timestamp(timestamp: Timestamp) -> str:
    """Write a storable timestamp as `YYYY-MM-DD hh:mm:ss.ffffff+00`."""
    return _format_second(timestamp.seconds) + _format_fraction(timestamp.nanos)


@lru_cache(maxsize=4096)
def _format_second(seconds: int) -> str:
    return f"{_EPOCH + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S}".rjust(19, "0")


@lru_cache(maxsize=4096)
def _format_fraction(nanos: int) -> str:
    return f".{nanos // 1000:06}+00"
