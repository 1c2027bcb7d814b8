"""Date-times are read as RFC 3339 says, with what the documentation adds to it."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from server.events.timestamps import (
    END_SECOND,
    FIRST_SECOND,
    format_timestamp,
    is_storable,
    parse_timestamp,
    truncate_timestamp,
)

NOON = 1_705_320_000  # 2024-01-15T12:00:00Z
MICROSECOND = timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

offsets = st.integers(-(23 * 60 + 59), 23 * 60 + 59).map(
    lambda minutes: timezone(timedelta(minutes=minutes))
)
instants = st.integers(FIRST_SECOND, END_SECOND - 1)


@pytest.mark.parametrize(
    ("text", "seconds", "nanos"),
    [
        ("2024-01-15T12:00:00Z", NOON, 0),
        ("2024-01-15t12:00:00z", NOON, 0),
        ("2024-01-15 12:00:00Z", NOON, 0),
        ("2024-01-15T12:00:00", NOON, 0),
        ("2024-01-15T12:00", NOON, 0),
        ("2024-01-15T12:00Z", NOON, 0),
        ("2024-01-15 12:00+00:00", NOON, 0),
        ("2024-01-15T12:00:00-00:00", NOON, 0),
        ("2024-01-15T14:30:00+02:30", NOON, 0),
        ("2024-01-15T02:00:00-10:00", NOON, 0),
        ("2024-01-16T11:59:00+23:59", NOON, 0),
        ("2024-01-15T12:00:00.5Z", NOON, 500_000_000),
        ("2024-01-15T12:00:00.000000001Z", NOON, 1),
        ("2024-01-15T12:00:00.1234567899999Z", NOON, 123_456_789),
        ("2024-01-15T12:00:00." + "9" * 10_000, NOON, 999_999_999),
        ("2024-01-15T11:59:60Z", NOON, 0),
        ("2016-12-31T23:59:60Z", 1_483_228_800, 0),
        ("2024-02-29T00:00:00Z", 1_709_164_800, 0),
        ("1969-12-31T23:59:59.25Z", -1, 250_000_000),
        ("0001-01-01T00:00:00Z", FIRST_SECOND, 0),
        ("9999-12-31T23:59:59.999999999Z", END_SECOND - 1, 999_999_999),
    ],
)
def test_timestamps_are_read_in_every_documented_form(text: str, seconds: int, nanos: int) -> None:
    """The T may be a space, letters lower case; seconds, fraction and offset may be missing."""
    assert parse_timestamp(text) == (seconds, nanos)


@pytest.mark.parametrize(
    "text",
    [
        *("", "now", "1705320000", "12:00:00", "2024-01-15", "2024-01-15Z", "2024-01-15T12Z"),
        *("20240115T120000Z", "2024-W03-1T12:00:00Z", "2024-015T12:00:00Z", "24-01-15T12:00:00Z"),
        *("2024-00-15T12:00:00Z", "2024-13-15T12:00:00Z", "2024-01-00T12:00:00Z"),
        *("2024-02-30T12:00:00Z", "2023-02-29T12:00:00Z", "0000-01-01T00:00:00Z"),
        *("2024-01-15T24:00:00Z", "2024-01-15T12:60:00Z", "2024-01-15T12:00:61Z"),
        *("2024-01-15T12:00:00.Z", "2024-01-15T12:00:00,5Z", "2024-01-15T12:00.5Z"),
        *("2024-01-15T12:00:00+24:00", "2024-01-15T12:00:00+01:60", "2024-01-15T12:00:00+0100"),
        *("2024-01-15T12:00:00+01", "2024-01-15T12:00:00\u221201:00", "2024-01-15T12:00:00 Z"),
        *(" 2024-01-15T12:00:00Z", "2024-01-15T12:00:00Z\n", "2024-01-15T12:00:00Z\0"),
        *("2024-01-15  12:00:00Z", "2024-01-15_12:00:00Z", "+2024-01-15T12:00:00Z"),
        *("10000-01-01T00:00:00Z", "-001-01-01T00:00:00Z", "2024-1-15T12:00:00Z"),
        *("\uff12024-01-15T12:00:00Z", "2024-01-15T12:00:0\u0660Z", "2024-01-15T12:00:00.\u096bZ"),
    ],
)
def test_timestamps_in_other_forms_are_refused(text: str) -> None:
    """Other forms of ISO 8601, impossible dates and digits that are not ASCII are refused."""
    with pytest.raises(ValueError):  # noqa: PT011 - its text is the input
        parse_timestamp(text)


@pytest.mark.parametrize(
    ("seconds", "nanos", "storable"),
    [
        (FIRST_SECOND, 0, True),
        (FIRST_SECOND - 1, 999_999_999, False),
        (END_SECOND - 1, 999_999_999, True),
        (*parse_timestamp("9999-12-31T23:59:60Z"), False),
        (*parse_timestamp("0001-01-01T00:00:00+00:01"), False),
        (*parse_timestamp("9999-12-31T23:59:59-00:01"), False),
        (0, -1, False),
        (0, 1_000_000_000, False),
        (-(2**63), 0, False),
        (2**63 - 1, 0, False),
    ],
)
def test_the_years_1_to_9999_can_be_stored(seconds: int, nanos: int, storable: bool) -> None:
    """The years 1 to 9999 of UTC can be stored, and a fraction is one of a second."""
    assert is_storable(Timestamp(seconds=seconds, nanos=nanos)) is storable


@given(st.datetimes(timezones=offsets), st.sampled_from("T "))
def test_timestamps_agree_with_datetime(moment: datetime, separator: str) -> None:
    """What Python writes is read as the same instant, whatever its offset and fraction."""
    seconds, nanos = parse_timestamp(moment.isoformat(separator))
    assert (seconds * 1_000_000 + nanos // 1000, nanos % 1000) == (
        (moment - EPOCH) // MICROSECOND,
        0,
    )


@given(instants, st.integers(0, 999_999_999))
def test_instants_are_written_unchanged_in_one_width(seconds: int, nanos: int) -> None:
    """What is written for PostgreSQL is the instant in whole microseconds, always of one width."""
    written = format_timestamp(Timestamp(seconds=seconds, nanos=nanos))
    expected = EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)
    assert (len(written), datetime.fromisoformat(written)) == (29, expected)


@given(instants, st.integers(0, 999_999_999))
def test_nanoseconds_are_cut_towards_the_past(seconds: int, nanos: int) -> None:
    """Nanoseconds are cut, not rounded: before 1970 too, an event never moves to a later time."""
    timestamp = Timestamp(seconds=seconds, nanos=nanos)
    truncate_timestamp(timestamp)
    assert (timestamp.seconds, timestamp.nanos) == (seconds, nanos // 1000 * 1000)


@given(st.tuples(instants, instants))
def test_texts_sort_as_instants(pair: tuple[int, int]) -> None:
    """Written instants sort as text the way they sort in time."""
    earlier, later = sorted(pair)
    texts = [format_timestamp(Timestamp(seconds=seconds)) for seconds in (earlier, later)]
    assert texts == sorted(texts)
