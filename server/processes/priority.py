"""Leaving the processor to other processes."""

import os
from contextlib import suppress
from pathlib import Path


def lower_priority(niceness: int) -> None:
    """Lets what else runs on this machine go first, by so much of 19.

    Between sessions Linux may heed the niceness of the session alone, which is set too where this
    process is the leader of one: https://man7.org/linux/man-pages/man7/sched.7.html, "The autogroup
    feature".
    """
    os.nice(niceness)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(niceness))
