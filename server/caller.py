"""Who sends a request."""

from typing import NamedTuple


class Quota(NamedTuple):
    """The events that a project may send in each day and in each month (UTC); None: any number."""

    daily: int | None = None
    monthly: int | None = None


class Caller(NamedTuple):
    """A project with one of its API keys.

    `event_rate` and `byte_rate` are the key's own limits a second, or None for the default;
    `origins` are those of the pages that may use it, or None for all; `quota` is the project's, or
    None if it has none; `key_id` is 0 if there is no key.
    """

    project_id: str
    key_id: int = 0
    event_rate: int | None = None
    byte_rate: int | None = None
    origins: frozenset[str] | None = None
    quota: Quota | None = None
