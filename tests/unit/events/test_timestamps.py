"""Date-times are read as ISO 8601 writes them, and written for PostgreSQL."""

import re
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
        ("2024-01-15T17:30:00+0530", NOON, 0),
        ("2024-01-15T17:00:00+05", NOON, 0),
        ("2024-01-15T17:00+05", NOON, 0),
        ("2024-01-15T12:00:00,123Z", NOON, 123_000_000),
        ("2024-01-15T17:00:00,5+0500", NOON, 500_000_000),
        ("20240115T120000Z", NOON, 0),
        ("20240115T1200", NOON, 0),
        ("20240115 120000.123Z", NOON, 123_000_000),
        ("20240115t173000+05:30", NOON, 0),
        ("20240115T070000-05", NOON, 0),
        ("20240115T115960z", NOON, 0),
        ("2024-01-14T24:00:00Z", NOON - 43_200, 0),
        ("2024-01-14T24:00", NOON - 43_200, 0),
        ("20240114T240000,000+00", NOON - 43_200, 0),
        ("2024-02-28T24:00:00.0Z", 1_709_164_800, 0),
        ("2024-12-31T24:00:00+01:00", 1_735_686_000, 0),
        ("0001-01-01T00:00:00Z", FIRST_SECOND, 0),
        ("9999-12-31T23:59:59.999999999Z", END_SECOND - 1, 999_999_999),
    ],
)
def test_timestamps_are_read_in_every_documented_form(text: str, seconds: int, nanos: int) -> None:
    """Basic and extended forms are taken; seconds, fraction and offset may be missing."""
    assert parse_timestamp(text) == (seconds, nanos)


@pytest.mark.parametrize(
    "text",
    [
        *("", "now", "1705320000", "12:00:00", "2024-01-15", "2024-01-15Z", "2024-01-15T12Z"),
        *("2024-W03-1T12:00:00Z", "2024W031T120000Z", "2024-015T12:00:00Z", "2024015T120000Z"),
        *("24-01-15T12:00:00Z", "2024-01T12:00:00Z", "202401T120000Z"),
        *("20240115T12:00:00Z", "2024-01-15T120000Z", "2024-0115T12:00:00Z", "202401-15T120000Z"),
        *("2024-01-15T1200Z", "20240115T12:00Z", "2024-01-15T12:0000Z", "20240115120000Z"),
        *("2024-00-15T12:00:00Z", "2024-13-15T12:00:00Z", "2024-01-00T12:00:00Z"),
        *("2024-02-30T12:00:00Z", "2023-02-29T12:00:00Z", "0000-01-01T00:00:00Z"),
        *("2024-01-15T24:00:01Z", "2024-01-15T24:00:00.001Z", "2024-01-15T24:01Z"),
        *("2024-01-15T24:00:60Z", "2024-01-15T25:00:00Z", "20240115T240000.5Z"),
        *("2024-01-15T12:60:00Z", "2024-01-15T12:00:61Z", "2024-01-15T12:00.5Z"),
        *("2024-01-15T12:00:00.Z", "2024-01-15T12:00:00,Z", "2024-01-15T12:00:00;5Z"),
        *("2024-01-15T12:00:00+24:00", "2024-01-15T12:00:00+01:60", "2024-01-15T12:00:00+1"),
        *("2024-01-15T12:00:00+100", "2024-01-15T12:00:00+01:", "2024-01-15T12:00:00+01:0"),
        *("2024-01-15T12:00+02Z", "2024-01-15T12:00+02.5", "2024-01-15T12:00:00+02:30Z"),
        *("2024-01-15T12:00:00\u221201:00", "2024-01-15T12:00:00 Z", "2024-01-15T12:00:00 +01"),
        *(" 2024-01-15T12:00:00Z", "2024-01-15T12:00:00Z\n", "2024-01-15T12:00:00Z\0"),
        *("2024-01-15  12:00:00Z", "2024-01-15_12:00:00Z", "+2024-01-15T12:00:00Z"),
        *("10000-01-01T00:00:00Z", "-001-01-01T00:00:00Z", "2024-1-15T12:00:00Z"),
        *("\uff12024-01-15T12:00:00Z", "2024-01-15T12:00:0\u0660Z", "2024-01-15T12:00:00.\u096bZ"),
    ],
)
def test_timestamps_in_other_forms_are_refused(text: str) -> None:
    """Incomplete and mixed forms, weeks, impossible dates and other digits are refused."""
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


# The grammar of what is taken, independent of the code that reads it.
@st.composite
def written_moments(draw: st.DrawFn) -> tuple[str, int, int]:
    """Make a date-time in any accepted form, with its seconds since 1970 and nanoseconds."""
    hyphen, colon = draw(st.sampled_from([("-", ":"), ("", "")]))
    day = draw(st.dates())
    text = f"{day.year:04}{hyphen}{day.month:02}{hyphen}{day.day:02}{draw(st.sampled_from('Tt '))}"
    hour = draw(st.integers(0, 24))
    minute = 0 if hour == 24 else draw(st.integers(0, 59))
    text += f"{hour:02}{colon}{minute:02}"
    second, digits = 0, ""
    if draw(st.booleans()):
        second = 0 if hour == 24 else draw(st.integers(0, 60))
        digits = draw(st.text("0" if hour == 24 else "0123456789", max_size=12))
        point = draw(st.sampled_from(".,")) if digits else ""
        text += f"{colon}{second:02}{point}{digits}"
    written_offset, offset = draw(offset_forms())
    elapsed = datetime(day.year, day.month, day.day, tzinfo=UTC) - EPOCH
    seconds = elapsed.days * 86_400 + hour * 3600 + minute * 60 + second - offset * 60
    return text + written_offset, seconds, int(f"{digits:0<9}"[:9])


@st.composite
def offset_forms(draw: st.DrawFn) -> tuple[str, int]:
    """Make an offset in any accepted form, with the minutes that it is ahead of UTC."""
    sign, hours, minutes = draw(
        st.tuples(st.sampled_from("+-"), st.integers(0, 23), st.integers(0, 59))
    )
    ahead = (60 * hours + minutes) * (1 if sign == "+" else -1)
    forms = [("", 0), ("Z", 0), ("z", 0)]
    forms += [(f"{sign}{hours:02}{colon}{minutes:02}", ahead) for colon in ("", ":")]
    forms += [(f"{sign}{hours:02}", ahead)] if minutes == 0 else []
    return draw(st.sampled_from(forms))


GRAMMAR = re.compile(
    r"(\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}(:\d{2}([.,]\d+)?)?"
    r"|\d{8}[Tt ]\d{4}(\d{2}([.,]\d+)?)?)"
    r"([Zz]|[+-]\d{2}|[+-]\d{4}|[+-]\d{2}:\d{2})?",
    re.ASCII,
)


@given(written_moments())
def test_every_form_of_iso_8601_is_read(moment: tuple[str, int, int]) -> None:
    """Whatever the grammar writes is read as the instant that it means."""
    text, seconds, nanos = moment
    assert parse_timestamp(text) == (seconds, nanos)


@given(written_moments(), st.data())
def test_nothing_outside_the_grammar_is_read(
    moment: tuple[str, int, int], data: st.DataObject
) -> None:
    """A damaged date-time is refused, unless the damage makes it another of the grammar."""
    text, start = moment[0], data.draw(st.integers(0, len(moment[0])))
    end = data.draw(st.integers(start, min(start + 2, len(text))))
    damaged = text[:start] + data.draw(st.text("0126:-+.,TZ W", max_size=2)) + text[end:]
    try:
        parse_timestamp(damaged)
    except ValueError:
        return
    assert GRAMMAR.fullmatch(damaged)


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
