"""The mapping of an event's JSON to its row, rule by rule, over HTTP."""

import json
from typing import Any

import pytest

from server.events.schema import EVENT_SCHEMA
from tests.support.clients import Tenant, accepted
from tests.support.events import Event

IDS = ["event_id", "session.id", "user.id"]
REQUIRED = ["event_id", "project_id", "session.id", "event.type", "event.timestamp"]
STRINGS = [*REQUIRED[:4], "user.id", "page.path", "ui.state.before", "error.stack"]
DURATIONS = ["duration_ms", "api.duration_ms"]
INTEGERS = ["event.sequence", "api.status_code", *DURATIONS]
LARGEST = {name: 2**31 - 1 if name == "api.status_code" else 2**63 - 1 for name in INTEGERS}

# A document with a lone surrogate may be read by another parser: nothing else may change.
BESIDE = pytest.mark.parametrize("beside", ["x", "\ud83d"], ids=["", "beside a surrogate"])


class Sender(Tenant):
    """A tenant that sends a single event, good or bad."""

    def store(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the row of an event with these changes; fail unless it is accepted."""
        return self.store_text(json.dumps(self.make_event(changes)))

    def store_text(self, event: str) -> dict[str, Any]:
        """Return the row of an event in JSON; fail unless it is accepted."""
        answer = self.post(f'{{"events": [{event}]}}'.encode())
        assert answer.json == accepted(1)
        [row] = self.take_rows()
        return row

    def reject(self, event: object) -> str:
        """Return the error of an event; fail unless it is rejected alone."""
        return self.reject_text(json.dumps(event))

    def reject_text(self, event: str) -> str:
        """Return the error of an event in JSON; fail unless it alone is rejected."""
        before, after = map(json.dumps, self.make_events(2))
        outcome = self.post(f'{{"events": [{before}, {event}, {after}]}}'.encode()).json
        assert (outcome["accepted"], outcome["rejected"]) == (2, 1)
        assert [row["event_id"] for row in self.take_rows()] == ["evt_0", "evt_1"]
        [error] = outcome["errors"]
        assert error["index"] == 1
        return str(error["error"])


@pytest.fixture
def sender(tenant: Tenant) -> Sender:
    """Return a tenant of the test's own."""
    return Sender(**vars(tenant))


def column(name: str) -> str:
    """Return the column of a documented field."""
    return name.replace(".", "_")


def write_event(event: Event, **numbers: str) -> str:
    """Return an event's JSON, in which strings that are names of numbers become their text."""
    text = json.dumps(event)
    for name, number in numbers.items():
        text = text.replace(f'"{name}"', number)
    return text


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", ["absent", None, ""])
def test_a_missing_required_field_is_named(sender: Sender, name: str, value: str | None) -> None:
    """A required field that is missing, null or empty is named."""
    event = sender.make_event({name: value})
    if value == "absent":
        del event[name]
    assert sender.reject(event) == f"{name}: required"


def test_the_first_failure_in_schema_order_is_reported(sender: Sender) -> None:
    """Of several failures the first in the order of the schema is told, the size last of all."""
    bad = [*REQUIRED, "duration_ms", "metadata"]
    event = sender.make_event({**dict.fromkeys(bad, True), "page.path": "x" * 102_400})
    for name in bad:
        assert sender.reject(event).startswith(f"{name}: ")
        event[name] = sender.make_event().get(name)
    assert sender.reject(event) == "event: larger than 102400 bytes"


@pytest.mark.parametrize("event", [None, 5, "event", [], True, [{}]], ids=repr)
def test_an_event_that_is_no_object_is_rejected(sender: Sender, event: object) -> None:
    """Anything but an object is rejected by itself."""
    assert sender.reject(event) == "event: must be an object"


@pytest.mark.parametrize("other", ["proj_demo", "PROJ", " ", "x" * 255])
def test_an_event_of_another_project_is_rejected(sender: Sender, other: str) -> None:
    """An event of another project is rejected, whether or not that project exists."""
    error = sender.reject(sender.make_event({"project_id": other}))
    assert error == "project_id: does not match the API key"


@pytest.mark.parametrize("name", STRINGS)
@pytest.mark.parametrize("value", [5, 1.5, True, [], {}], ids=repr)
def test_a_string_field_must_be_a_string(sender: Sender, name: str, value: object) -> None:
    """What is documented as a string must be one."""
    assert sender.reject(sender.make_event({name: value})) == f"{name}: must be a string"


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("text", ["x" * 255, "é" * 127 + "x", "😀" * 63 + "xyz"])
def test_an_id_has_at_most_255_bytes(sender: Sender, name: str, text: str) -> None:
    """An id of 255 bytes of UTF-8 is kept whole; one byte more, and its event is rejected."""
    assert sender.store({name: text})[column(name)] == text
    assert sender.reject(sender.make_event({name: f"{text}x"})).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        *((text, text) for text in ("", "plain", " spaces ", "null", "NULL", "\t\r\n\b\v\f\x7f")),
        *((text, text) for text in (r"\N", r"\.", "a\n\\.\nb", r"C:\new\table", "\"'`;--", "%s")),
        *((text, text) for text in ("é 漢 😀 \u202e\ufeff\x85\u2028", r"\ud83d \u0000 in words")),
        ("a\0b", "a\ufffdb"),
        ("cut \ud83d", "cut \ufffd"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d and \U0001f600", "\ufffd and \U0001f600"),
        (r"\u0000 and " + "\0", r"\u0000 and " + "\ufffd"),
        ("\\\ud83d", "\\\ufffd"),
    ],
    ids=repr,
)
def test_strings_are_stored_with_only_unstorable_characters_replaced(
    sender: Sender, text: str, stored: str
) -> None:
    """Strings are stored as they are, but for what cannot be: it becomes U+FFFD."""
    free_form = {text: text, "list": [text]}
    sent = {"event_id": f"{text}.", "page.title": text, "metadata": free_form}
    row = sender.store(sent | {"attributes": free_form})
    assert (row["event_id"], row["page_title"]) == (f"{stored}.", stored)
    assert row["metadata"] == row["attributes"] == {stored: stored, "list": [stored]}


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("2024-01-15T10:30:15Z", "2024-01-15T10:30:15"),
        ("2024-01-15 10:30:15Z", "2024-01-15T10:30:15"),
        ("2024-01-15T10:30:15", "2024-01-15T10:30:15"),
        ("2024-01-15 10:30", "2024-01-15T10:30:00"),
        ("2024-01-15T10:30Z", "2024-01-15T10:30:00"),
        ("2024-01-15T10:30+02:00", "2024-01-15T08:30:00"),
        ("2024-01-15T10:30:15.5Z", "2024-01-15T10:30:15.5"),
        ("2024-01-15T10:30:15.000", "2024-01-15T10:30:15"),
        ("2024-01-15T10:30:15.123456Z", "2024-01-15T10:30:15.123456"),
        ("2024-01-15T10:30:15.1234569Z", "2024-01-15T10:30:15.123456"),
        ("2024-01-15T10:30:15.9999999999999Z", "2024-01-15T10:30:15.999999"),
        ("1969-12-31T23:59:59.9999999Z", "1969-12-31T23:59:59.999999"),
        ("2024-01-15T10:30:15+05:30", "2024-01-15T05:00:15"),
        ("2024-01-15T23:30:15-08:00", "2024-01-16T07:30:15"),
        ("2024-01-15T10:30:15-00:00", "2024-01-15T10:30:15"),
        ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00"),
        ("2024-01-15T10:30:15+0530", "2024-01-15T05:00:15"),
        ("2024-01-15T10:30:15+05", "2024-01-15T05:30:15"),
        ("2024-01-15T10:30:15,123Z", "2024-01-15T10:30:15.123"),
        ("20240115T103015Z", "2024-01-15T10:30:15"),
        ("2024-01-15T24:00:00Z", "2024-01-16T00:00:00"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00"),
        ("0001-01-01T00:00:00-01:00", "0001-01-01T01:00:00"),
        ("9999-12-31T23:59:59.999999999Z", "9999-12-31T23:59:59.999999"),
    ],
)
def test_rfc_3339_timestamps_are_stored_in_utc_microseconds(
    sender: Sender, text: str, stored: str
) -> None:
    """An ISO 8601 timestamp is stored in UTC, cut to microseconds."""
    assert sender.store({"event.timestamp": text})["event_timestamp"] == f"{stored}+00:00"


@pytest.mark.parametrize(
    "value",
    [
        *("yesterday", "now", "infinity", "epoch", " ", "1705314600", "T10:30:00Z"),
        *("2024-01-15", "2024-01-15T", "2024-01-15T10Z", "2024-01-15T10:30:00.Z"),
        *("2024-W03-1T10:30:00Z", "2024-015T10:30:00Z", "20240115T10:30:00Z", "2024W031T103000Z"),
        *("2024-1-15T10:30:00Z", "24-01-15T10:30:00Z", "12024-01-15T10:30:00Z"),
        *("2024-13-15T10:30:00Z", "2024-00-15T10:30:00Z", "2023-02-29T10:30:00Z"),
        *("2024-01-15T25:30:00Z", "2024-01-15T10:60:00Z", "2024-01-15T10:30:61Z"),
        *("2024-01-15T10:30:00+24:00", "2024-01-15T10:30:00+01:60", "2024-01-15T10:30:00 UTC"),
        *(" 2024-01-15T10:30:00Z", "2024-01-15T10:30:00Z ", "2024-01-15T10:30:00Z\n"),
        *("2024-01-15T10:30:00Z\0", "\uff12024-01-15T10:30:00Z", "2024-01-15T10:30:0\u0660Z"),
        *("0000-12-31T23:59:59Z", "10000-01-01T00:00:00Z", "-2024-01-15T10:30:00Z"),
        *("0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01"),
        *(1705314600, 1705314600.5, True, [], {}, ["2024-01-15T10:30:00Z"], {"seconds": 1}),
    ],
    ids=repr,
)
def test_other_timestamps_are_rejected(sender: Sender, value: object) -> None:
    """Anything else, or a moment outside the years 1 to 9999, is rejected."""
    error = sender.reject(sender.make_event({"event.timestamp": value}))
    assert (
        error == "event.timestamp: must be an ISO 8601 date-time, such as 2024-01-15T10:30:00.123Z"
    )


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        *(("0", 0), ("-0", 0), ("-1", -1), ("200", 200), ("200.0", 200), ("2e2", 200)),
        *(('"200"', 200), ('"-7"', -7), ('"0"', 0), ("null", None)),
    ],
)
def test_integers_come_as_numbers_or_as_texts(
    sender: Sender, name: str, sent: str, stored: int | None
) -> None:
    """Integers come as integers, as integral floats and as strings; null is none."""
    event = write_event(sender.make_event({name: "SENT"}), SENT=sent)
    assert sender.store_text(event)[column(name)] == stored


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("quote", ["", '"'], ids=["number", "string"])
def test_a_field_takes_every_integer_of_its_column(sender: Sender, name: str, quote: str) -> None:
    """A field takes the integers that its column can hold, to the last one."""
    for limit, beyond in ((LARGEST[name], 1), (-LARGEST[name] - 1, -1)):
        event = sender.make_event({name: "SENT"})
        row = sender.store_text(write_event(event, SENT=f"{quote}{limit}{quote}"))
        assert row[column(name)] == limit
        error = sender.reject_text(write_event(event, SENT=f"{quote}{limit + beyond}{quote}"))
        assert error.startswith(f"{name}: ")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("number", ["1e19", "-1e300", "1" + "0" * 5000], ids=len)
@BESIDE
def test_a_huge_integer_rejects_only_its_own_event(
    sender: Sender, name: str, number: str, beside: str
) -> None:
    """A number far out of range is rejected with its event alone."""
    event = sender.make_event({name: "SENT", "page.path": beside})
    assert sender.reject_text(write_event(event, SENT=number)).startswith(f"{name}: ")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "x", "7x", " 7", "7 ", "7\n", "0x10", "1_000", "\u0667", "--7", "NaN"),
        *("Infinity", True, False, [], [7], {}, {"value": 7}),
    ],
    ids=repr,
)
def test_a_value_that_is_no_integer_is_rejected(sender: Sender, name: str, value: object) -> None:
    """What is no integer is rejected."""
    assert sender.reject(sender.make_event({name: value})) == f"{name}: must be an integer"


@pytest.mark.parametrize("name", ["event.sequence", "api.status_code"])
@pytest.mark.parametrize("value", [200.5, 0.1, -1.5])
def test_an_integer_that_is_no_duration_has_no_fraction(
    sender: Sender, name: str, value: float
) -> None:
    """An integer that is no duration has no fraction."""
    assert sender.reject(sender.make_event({name: value})) == f"{name}: must be an integer"


@pytest.mark.parametrize("name", DURATIONS)
@pytest.mark.parametrize(
    ("sent", "stored"),
    [(123.4, 123), (123.6, 124), (0.4, 0), (-1.6, -2), (0.5, 1), (1.5, 2), (2.5, 3), (-0.5, -1)],
)
def test_durations_are_rounded_to_the_nearest_millisecond(
    sender: Sender, name: str, sent: float, stored: int
) -> None:
    """Durations are rounded to the nearest millisecond, halves away from zero."""
    assert sender.store({name: sent})[column(name)] == stored


ALL_TYPES = ", ".join(EVENT_SCHEMA.fields[3].rules.allowed_values)


@pytest.mark.parametrize("value", ["ui.hover", "x", "😀", "pageviewed", "clic é 漢"])
def test_an_unknown_event_type_is_answered_with_all(sender: Sender, value: str) -> None:
    """An event type that is like none of the documented ones is quoted, and they are listed."""
    error = sender.reject(sender.make_event({"event.type": value}))
    assert error == f"event.type: unknown type '{value}', must be one of {ALL_TYPES}"


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        *(("click", "ui.click"), ("PAGE.VIEW", "page.view"), ("page.view ", "page.view")),
        *(("page_view", "page.view"), ("pageView", "page.view"), ("ui.clik", "ui.click")),
        *(("ui.clicks", "ui.click"), ("ui.cilck", "ui.click"), ("api.reqwest", "api.request")),
        *(("Error", "error"), ("errors", "error"), ("step", "journey.step")),
    ],
)
def test_a_misspelt_event_type_is_answered_with_the_nearest(
    sender: Sender, value: str, meant: str
) -> None:
    """A type of another case or sign, without its group or with one wrong letter is recognised."""
    error = sender.reject(sender.make_event({"event.type": value}))
    assert error == f"event.type: unknown type '{value}', did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        *(("session.id", "session_id"), ("session.id", "sessionId"), ("event_id", "eventId")),
        *(("event.timestamp", "event_timestamp"), ("project_id", "Project-ID")),
        ("event.type", "eventType"),
    ],
)
@pytest.mark.parametrize("other", [{}, {"metadata": 5}, {"attributes": {"x": 1.0}}], ids=repr)
def test_a_missing_field_is_found_under_another_spelling(
    sender: Sender, name: str, sent: str, other: dict[str, object]
) -> None:
    """The error of a missing field names the field that was sent in its place."""
    event = sender.make_event(other)
    event[sent] = event.pop(name)
    assert sender.reject(event) == f"{name}: required, but '{sent}' was sent"


@pytest.mark.parametrize(
    "character", ["x", "é", "\n", "\x1b", "\x7f", "\x9b", "\u202e", "\0", "\ud83d", "'"], ids=ascii
)
def test_quoted_values_are_short_and_harmless_to_terminals(sender: Sender, character: str) -> None:
    """At most 64 characters of a value are quoted, and none that controls a terminal."""
    error = sender.reject(sender.make_event({"event.type": f"begin{character * 60}end"}))
    assert error.startswith("event.type: unknown type 'begin")
    assert "end" not in error
    assert error.isprintable()


@pytest.mark.parametrize("value", [[], [{}], "x", "", "{}", 5, 0, True, False], ids=repr)
def test_metadata_that_is_no_object_is_rejected(sender: Sender, value: object) -> None:
    """Metadata that is no object is rejected."""
    assert sender.reject(sender.make_event({"metadata": value})) == "metadata: must be an object"


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        *((text, text) for text in ("0", "0.1", "-2.5e-07", "5e-324", "true", "false", "null")),
        *((text, text) for text in ('""', "{}", "[]", "[[], [null], {}]", '{"__proto__": ""}')),
        *(("-0.0", "0"), ("5.0", "5"), ("1e3", "1000"), ("1e21", "1000000000000000000000")),
        ("9007199254740992", "9007199254740992"),
        ("9007199254740993", '"9007199254740993"'),
        ("-9007199254740993", '"-9007199254740993"'),
        ("1152921504606846976", "1152921504606846976"),
        ("18446744073709551615", '"18446744073709551615"'),
        ("18446744073709551617", '"18446744073709551617"'),
        ("100000000000000000000000", '"100000000000000000000000"'),
        ("7" * 5000, f'"{"7" * 5000}"'),
        *(("1e999", "null"), ("-1e999", "null")),
        ('{"twice": 1, "twice": 2}', '{"twice": 2}'),
    ],
    ids=lambda text: text[:24],
)
@BESIDE
def test_free_form_values_are_stored_as_sent(
    sender: Sender, sent: str, stored: str, beside: str
) -> None:
    """Values are stored as sent: numbers as doubles, or as text where a double loses digits."""
    event = {"metadata": {"x": "SENT"}, "attributes": {"x": "SENT"}, "page.path": beside}
    row = sender.store_text(write_event(sender.make_event(event), SENT=sent))
    assert json.dumps(row["metadata"]["x"]) == stored
    assert json.dumps(row["attributes"]["x"]) == stored


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ({}, None),
        ({"attributes": None, "org.id": None}, None),
        ({"performance.lcp_ms": 123.5}, {"performance.lcp_ms": 123.5}),
        ({"ui.viewport": {"width": 8}}, {"ui.viewport": {"width": 8}}),
        ({"session_id": "s", "pagePath": "/"}, {"session_id": "s", "pagePath": "/"}),
        ({"event_type": 5, "eventId": []}, {"event_type": 5, "eventId": []}),
        ({"attributes": {"a": 1}}, {"a": 1}),
        ({"attributes": {"a": 1, "b": 2}, "a": 3}, {"a": 3, "b": 2}),
        ({"a": 3, "attributes": {"a": 1, "b": 2}}, {"a": 3, "b": 2}),
        ({"attributes": {"attributes": {"a": 1}}}, {"attributes": {"a": 1}}),
        ({"attributes": {"page.path": "/inner"}}, {"page.path": "/inner"}),
        ({"attributes": [1]}, {"attributes": [1]}),
        ({"attributes": "x", "a": 1}, {"attributes": "x", "a": 1}),
        ({"attributes": 0}, {"attributes": 0}),
        ({"": 1, " ": 2}, {"": 1, " ": 2}),
    ],
)
def test_fields_outside_the_schema_become_attributes(
    sender: Sender, sent: dict[str, Any], stored: object
) -> None:
    """Whatever the schema does not name is kept in attributes, and maps to no column."""
    row = sender.store({"page.path": "/outer"} | sent)
    assert row["attributes"] == stored
    assert (row["page_path"], row["session_id"]) == ("/outer", "sess_1")


@pytest.mark.parametrize("name", ["page.path", "event.sequence", "user.id", "metadata"])
def test_null_means_that_a_field_is_absent(sender: Sender, name: str) -> None:
    """Null means absent."""
    assert sender.store({name: None})[column(name)] is None


@pytest.mark.parametrize(("opening", "closing"), [('{"k":', "}"), ("[", "]")])
@BESIDE
def test_an_event_may_nest_32_levels(
    sender: Sender, opening: str, closing: str, beside: str
) -> None:
    """32 levels are stored, the metadata's own among them; deeper events are rejected alone."""

    def write_nested(levels: int) -> str:
        inner = opening * (levels - 1) + "0" + closing * (levels - 1)
        event = sender.make_event({"metadata": {"k": "INNER"}, "page.path": beside})
        return write_event(event, INNER=inner)

    stored = json.dumps(sender.store_text(write_nested(32))["metadata"])
    assert stored.count(opening[0]) == 31 + (opening != "[")
    for levels in (33, 1000, 100_000):
        assert sender.reject_text(write_nested(levels)).startswith("metadata: ")
