"""Why an event is rejected."""

from enum import StrEnum
from typing import NamedTuple


class Reason(StrEnum):
    """What problems are counted as."""

    REQUIRED = "required"
    UNKNOWN_VALUE = "unknown_value"
    TOO_LONG = "too_long"
    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    WRONG_PROJECT = "wrong_project"
    INVALID_TIMESTAMP = "invalid_timestamp"
    INVALID_ENCODING = "invalid_encoding"
    OUT_OF_RANGE = "out_of_range"
    WRONG_TYPE = "wrong_type"


class Fault(NamedTuple):
    """What is wrong with a value, in words for whoever sent it."""

    reason: Reason
    text: str


class Problem(NamedTuple):
    """What is wrong with an event; `field` is a documented name, or `event` for the whole."""

    field: str
    reason: Reason
    text: str

    def __str__(self) -> str:
        return f"{self.field}: {self.text}"


class InvalidEvent(Exception):
    """One event cannot be accepted."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class InvalidValue(ValueError):
    """A field cannot take the value that was sent for it."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.text)
        self.fault = fault


REQUIRED = Fault(Reason.REQUIRED, "required")
NOT_A_TIMESTAMP = Fault(
    Reason.INVALID_TIMESTAMP, "must be an ISO 8601 date-time, such as 2024-01-15T10:30:00.123Z"
)
NOT_A_STRING = Fault(Reason.WRONG_TYPE, "must be a string")
NOT_AN_INTEGER = Fault(Reason.WRONG_TYPE, "must be an integer")
NOT_AN_OBJECT = Fault(Reason.WRONG_TYPE, "must be an object")
NOT_UTF8 = Fault(Reason.INVALID_ENCODING, "must be valid UTF-8")
WRONG_PROJECT = Fault(Reason.WRONG_PROJECT, "does not match the API key")
NOT_AN_EVENT = Problem("event", *NOT_AN_OBJECT)


def report_excess(max_bytes: int) -> Problem:
    """Return the problem of an event that is larger than the limit of `max_bytes`."""
    return Problem("event", Reason.TOO_LARGE, f"larger than {max_bytes} bytes")


def report_nesting(max_depth: int) -> Fault:
    """Return the fault of an object that nests deeper than the limit of `max_depth` levels."""
    return Fault(Reason.TOO_DEEP, f"nested more than {max_depth} levels deep")
