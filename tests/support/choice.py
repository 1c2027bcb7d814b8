"""What a command line chooses by name."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar


class Named(Protocol):
    """What can be chosen."""

    @property
    def name(self) -> str:
        """What it is chosen by."""


T = TypeVar("T", bound=Named)


def choose_matching(things: Sequence[T], patterns: Sequence[str], complaint: str) -> list[T]:
    """Those whose names match one of the patterns, such as `http-*`.

    Raises ValueError for a pattern without any: the complaint, with `{pattern}` and all `{names}`.
    """
    for pattern in patterns:
        if not any(fnmatchcase(thing.name, pattern) for thing in things):
            names = ", ".join(thing.name for thing in things)
            raise ValueError(complaint.format(pattern=repr(pattern), names=names))
    return [thing for thing in things if any(fnmatchcase(thing.name, p) for p in patterns)]
