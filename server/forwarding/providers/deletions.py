"""What the providers' APIs for the deletion of persons have in common.

As with events, nothing here does I/O: requests and rulings are plain values.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from server.events.persons import Person
from server.forwarding.providers.provider import Answer, Request


@dataclass(frozen=True)
class Ruling:
    """A deletion as an answer describes it: its state, a detail of that, and the provider's job."""

    state: str
    detail: str = ""
    job: str | None = None


class DeletionService(Protocol):
    """One analytics service, as far as it deletes persons.

    `secrets` are the forms of the credentials that an answer might repeat; `pause_seconds` must be
    between two requests.
    """

    name: str
    secrets: tuple[str, ...]
    pause_seconds: float

    def request_deletion(self, person: Person) -> Request | None:
        """Return the request that deletes a person, or None if there is none for such ids.

        Made twice, it deletes once.
        """

    def read_deletion(self, person: Person, answer: Answer) -> Ruling | None:
        """Return what a successful answer to that says, or None if it makes no sense."""

    def request_state(self, job: str) -> Request:
        """Return the request that asks how far a job is."""

    def read_state(self, job: str, answer: Answer) -> Ruling | None:
        """Return what a successful answer to that says, or None if it makes no sense."""


def read_objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list, or the only one."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, dict)]


def read_document(answer: Answer) -> Any:
    """Return the JSON value of an answer's body, or None."""
    try:
        return orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return None
