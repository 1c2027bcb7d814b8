"""Events become lines that COPY reads back as they were."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.events.schema import EVENT_SCHEMA, Kind
from tests.support.events import ENCODER, make_row

OPTIONAL_TEXTS = [
    field.name for field in EVENT_SCHEMA.of_kind(Kind.TEXT) if not field.rules.required
]


def encode(**fields: Any) -> dict[str, str]:
    """Return what each column of the row of an event with further fields has, with quotes."""
    line = make_row("p", "e", **fields).text.removesuffix("\n")
    values = re.findall(r"(\x01(?:[^\x01]|\x01\x01)*\x01|[^\t\x01]*)(?:\t|$)", line)
    return dict(zip(ENCODER.columns, values, strict=False))


def test_every_schema_field_has_a_column() -> None:
    """There is a column for each field of the schema, under its name."""
    assert sorted(ENCODER.columns) == sorted(field.name for field in EVENT_SCHEMA.fields)


def test_an_absent_field_is_null_in_its_row() -> None:
    """What an event does not have is NULL."""
    required = {field.name for field in EVENT_SCHEMA.fields if field.rules.required}
    assert {name for name, value in encode().items() if value} == required


@pytest.mark.parametrize("name", OPTIONAL_TEXTS)
def test_an_empty_text_stays_empty_in_its_row(name: str) -> None:
    """An empty text that was sent is an empty text, in every optional field."""
    assert encode(**{name: ""})[name] == "\x01\x01"


@pytest.mark.parametrize(
    "field", EVENT_SCHEMA.of_kind(Kind.INTEGER, Kind.LONG), ids=lambda field: field.name
)
@pytest.mark.parametrize("end", ["first", "zero", "last"])
def test_zeros_and_extreme_numbers_stay_in_their_row(field: Any, end: str) -> None:
    """A zero that was sent is a zero, and the ends of a field's range are kept."""
    number = {"first": field.range.start, "zero": 0, "last": field.range.stop - 1}[end]
    assert encode(**{field.name: number})[field.name] == str(number)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain 'text' \"quoted\"", "plain 'text' \"quoted\""),
        ("a\tb", "\x01a\tb\x01"),
        ("a\n", "\x01a\n\x01"),
        ("a\rb", "\x01a\rb\x01"),
        ("\x01", "\x01\x01\x01\x01"),
        ("\x01\x01", "\x01\x01\x01\x01\x01\x01"),
        (r"\N", r"\N"),
        (r"\.", r"\."),
        ("\b\f\v\x02\x7f\u2028", "\b\f\v\x02\x7f\u2028"),
    ],
    ids=repr,
)
def test_characters_with_meaning_to_copy_are_quoted(text: str, written: str) -> None:
    """What means something to COPY is quoted, in every column and nothing else."""
    assert encode(event_name=text, user_id=text)["event_name"] == written
    assert encode(event_name="plain", user_id=text)["event_name"] == "plain"


def test_json_stands_in_its_column_unchanged() -> None:
    """JSON stands in its column as it is: what it escapes means nothing to COPY."""
    metadata = {'a"b': "line\nend\\"}
    assert encode(metadata=metadata)["metadata"] == r'{"a\"b":"line\nend\\"}'


@pytest.mark.parametrize(("nanos", "fraction"), [(0, "000000"), (999_999_999, "999999")])
def test_instants_are_written_in_utc_microseconds(nanos: int, fraction: str) -> None:
    """Instants are written in microseconds of UTC."""
    assert encode(nanos=nanos)["event_timestamp"] == f"2024-01-15 12:00:00.{fraction}+00"


ids = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
identities = st.tuples(ids, st.integers(0, 3), ids)


@given(identities, identities)
def test_row_identities_equal_and_sort_as_primary_keys(
    one: tuple[str, int, str], other: tuple[str, int, str]
) -> None:
    """Identities are equal if the primary keys are, and sort as their bytes do."""

    def identify(identity: tuple[str, int, str]) -> tuple[str, int, str]:
        project_id, seconds, event_id = identity
        return make_row(project_id, event_id, seconds=seconds, nanos=1999).identity

    def as_stored(identity: tuple[str, int, str]) -> tuple[bytes, int, bytes]:
        return identity[0].encode(), identity[1], identity[2].encode()

    made = identify(one), identify(other)
    assert made[0] == (one[0], one[1] * 1_000_000 + 1, one[2])
    assert (made[0] == made[1]) is (one == other)
    assert (made[0] < made[1]) is (as_stored(one) < as_stored(other))
