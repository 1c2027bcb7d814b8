"""Giving way to other processes."""

import os
from contextlib import suppress
from pathlib import Path


def lower_priority(niceness: int) -> None:
    """Lower this process's priority by `niceness`, of at most 19.

    Between sessions Linux may look at the niceness of the session only, which is therefore set too
    if this process leads one: https://man7.org/linux/man-pages/man7/sched.7.html, "The autogroup
    feature".
    """
    os.nice(niceness)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(niceness))
