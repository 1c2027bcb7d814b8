"""Date-times: read from JSON, cut to what the table holds, written for COPY."""

import re
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

_OFFSET = r"(?:[Zz]|([+-](?:[01]\d|2[0-3]))(?::?([0-5]\d))?)?"
# A complete calendar date-time of ISO 8601, basic or extended by its first hyphen; seconds and
# offset may be missing, and the T may be a space. Week and ordinal dates are not taken.
_DATE_TIME = re.compile(
    r"(\d{4})(-)?(\d\d)(?(2)-)(\d\d)[Tt ]([01]\d|2[0-4])(?(2):)([0-5]\d)"
    rf"(?:(?(2):)([0-5]\d|60)(?:[.,](\d+))?)?{_OFFSET}",
    re.ASCII,
)
# What most clients send, in two parts: to the second, and from there.
_TO_SECOND = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d", re.ASCII)
_FROM_SECOND = re.compile(rf"(?:[.,](\d{{1,9}}))?{_OFFSET}", re.ASCII)
# No client writes a date-time in more characters, but it could.
_ORDINARY_LENGTH = 40
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY = _EPOCH.toordinal()

# 0001-01-01T00:00:00Z and the end of 9999, in seconds since 1970.
FIRST_SECOND, END_SECOND = -62_135_596_800, 253_402_300_800


def parse_timestamp(text: str) -> tuple[int, int]:
    """Return the seconds since 1970 and the nanoseconds of an ISO 8601 date-time.

    Digits after the ninth of a fraction are cut. Second 60 is the first of the next minute, and
    24:00 the first of the next day. Raises ValueError for any other text and for dates that do not
    exist; the years are not limited here.
    """
    try:
        seconds = _parse_second(text[:19])
        ahead, nanos = _parse_rest(text[19:])
    except ValueError:
        return _parse_any(text)
    return seconds - ahead, nanos


def read_moment(text: Any) -> tuple[int, int, str]:
    """Return the seconds, the nanoseconds and COPY's text of a date-time, cut to microseconds.

    Raises ValueError or TypeError for whatever is no storable date-time of an ordinary length.
    """
    if type(text) is not str or len(text) > _ORDINARY_LENGTH:
        raise ValueError(text)
    try:
        seconds, date_time = _read_second(text[:19])
        ahead, nanos, fraction = _read_rest(text[19:])
        if not ahead:  # as most are
            return seconds, nanos, date_time + fraction
        seconds -= ahead
    except ValueError:
        seconds, nanos = _parse_any(text)
        nanos, fraction = _cut_nanos(nanos)
    return seconds, nanos, _format_checked(seconds) + fraction


# The events of a batch tend to share their seconds, and clients write no more than milliseconds.
@lru_cache(maxsize=4096)
def _parse_second(text: str) -> int:
    if not _TO_SECOND.fullmatch(text) or text[11:13] == "24":  # which depends on the fraction
        raise ValueError(text)
    return _parse_any(text)[0]


@lru_cache(maxsize=4096)
def _parse_rest(text: str) -> tuple[int, int]:
    match = _FROM_SECOND.fullmatch(text)
    if match is None:
        raise ValueError(text)
    fraction, hours, minutes = match.groups("")
    return _count_seconds(hours, minutes), _count_nanos(fraction)


@lru_cache(maxsize=4096)
def _read_second(text: str) -> tuple[int, str]:
    seconds = _parse_second(text)
    return seconds, _format_checked(seconds)


@lru_cache(maxsize=4096)
def _read_rest(text: str) -> tuple[int, int, str]:
    ahead, nanos = _parse_rest(text)
    return ahead, *_cut_nanos(nanos)


def _cut_nanos(nanos: int) -> tuple[int, str]:
    return nanos - nanos % 1000, _format_fraction(nanos)


def _format_checked(seconds: int) -> str:
    if not FIRST_SECOND <= seconds < END_SECOND:
        raise ValueError(seconds)
    return _format_second(seconds)


def _parse_any(text: str) -> tuple[int, int]:
    match = _DATE_TIME.fullmatch(text)
    if match is None:
        raise ValueError(text)
    year, _, month, day, hour, minute, second, fraction, offset, offset_minutes = match.groups("")
    seconds = 3600 * int(hour) + 60 * int(minute) + int(second or 0)
    if hour == "24" and (seconds > 86_400 or fraction.strip("0")):
        raise ValueError(text)
    day_number = date(int(year), int(month), int(day)).toordinal() - _EPOCH_DAY
    seconds += 86_400 * day_number - _count_seconds(offset, offset_minutes)
    return seconds, _count_nanos(fraction)


def _count_seconds(hours: str, minutes: str) -> int:
    """Return the seconds of an offset whose sign stands before its hours; both may be missing."""
    return 3600 * int(hours or 0) + 60 * int(f"{hours[:1]}{minutes or 0}")


def _count_nanos(fraction: str) -> int:
    return int(fraction[:9].ljust(9, "0"))


def is_storable(timestamp: Timestamp) -> bool:
    """Tell whether a timestamp is well-formed and falls within the years 1 to 9999."""
    return FIRST_SECOND <= timestamp.seconds < END_SECOND and 0 <= timestamp.nanos < 1_000_000_000


def truncate_timestamp(timestamp: Timestamp) -> None:
    """Cut a timestamp to whole microseconds, which is what PostgreSQL can hold."""
    if excess := timestamp.nanos % 1000:
        timestamp.nanos -= excess


def count_microseconds(timestamp: Timestamp) -> int:
    """Return the whole microseconds from 1970 to a timestamp."""
    return timestamp.seconds * 1_000_000 + timestamp.nanos // 1000


def format_timestamp(timestamp: Timestamp) -> str:
    """Write a storable timestamp as `YYYY-MM-DD hh:mm:ss.ffffff+00`."""
    return format_moment(timestamp.seconds, timestamp.nanos)


def format_moment(seconds: int, nanos: int) -> str:
    """Write a moment in the same way; raises ValueError if it is not storable."""
    if not 0 <= nanos < 1_000_000_000:
        raise ValueError(nanos)
    return _format_checked(seconds) + _format_fraction(nanos)


@lru_cache(maxsize=4096)
def _format_second(seconds: int) -> str:
    return f"{_EPOCH + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S}".rjust(19, "0")


@lru_cache(maxsize=4096)
def _format_fraction(nanos: int) -> str:
    return f".{nanos // 1000:06}+00"
