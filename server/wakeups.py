"""Waking the loops of both protocols: once for all answers of a commit, not once for each.

A loop that is woken by the first of a hundred completed futures takes the interpreter's lock from
the thread that completes the others, handles that one, and sleeps until the next. So whoever
completes many at once does so within `gathered_wakeups`, and each loop is woken after the last.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Wake = Callable[[], None]


class _Gathered(threading.local):
    wakes: dict[Wake, None] | None = None


_gathered = _Gathered()


def wake(loop: Wake) -> None:
    """Wake a loop now, or once at the end if this thread gathers wake-ups."""
    if _gathered.wakes is None:
        loop()
    else:
        _gathered.wakes[loop] = None


@contextmanager
def gathered_wakeups() -> Iterator[None]:
    """Put off what this thread wakes until the block ends, and wake each loop once."""
    wakes = _gathered.wakes = {}
    try:
        yield
    finally:
        _gathered.wakes = None
        for loop in wakes:
            loop()
