"""Token buckets that the processes of a machine share.

A bucket holds what a second brings. Its whole state is the moment at which it will be full again
(GCRA: https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm), so that time fills it by itself.
"""

import fcntl
import mmap
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable

SECOND = 1_000_000_000  # in the nanoseconds that all times here are in
_STATE = struct.Struct("=q")


def take(full_at: int, now: int, cost: int) -> int | None:
    """When a bucket will be full again after `cost` is taken from it now; None where it may not be.

    `cost` is the time that it takes to flow in again. More than a whole bucket may be taken from a
    full one: then nothing may be until that is made up for.
    """
    if full_at <= now:
        return now + cost
    if full_at - now + cost <= SECOND:
        return full_at + cost
    return None


class BucketTable:
    """Buckets by number in shared memory, all full at first.

    A file descriptor of it can be inherited: every process that has it sees the same buckets.
    Numbers beyond the table's size start again at its beginning, and share a bucket.
    """

    SIZE = 1 << 21

    def __init__(
        self, descriptor: int | None = None, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """Open an inherited table, or make a new one; the clock must be that of the machine."""
        if descriptor is None:
            descriptor = _create_file()
            os.ftruncate(descriptor, self.SIZE * _STATE.size)
        self.descriptor = descriptor
        self._clock = clock
        self._memory = mmap.mmap(descriptor, self.SIZE * _STATE.size)
        self._lock = threading.Lock()

    def take(self, number: int, cost: int) -> bool:
        """Take from a bucket as `take` does, and say whether that was possible."""
        place = number % self.SIZE * _STATE.size
        # The file's lock keeps other processes out, and no threads of this one. The kernel takes it
        # from a process that dies.
        with self._lock:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX, _STATE.size, place)
            try:
                (full_at,) = _STATE.unpack_from(self._memory, place)
                taken = take(full_at, self._clock(), cost)
                if taken is not None:
                    _STATE.pack_into(self._memory, place, taken)
            finally:
                fcntl.lockf(self.descriptor, fcntl.LOCK_UN, _STATE.size, place)
        return taken is not None

    def seconds_to_full(self, number: int) -> float:
        """How long it takes a bucket to be full, if nothing is taken meanwhile; 0 if it is."""
        full_at: int = _STATE.unpack_from(self._memory, number % self.SIZE * _STATE.size)[0]
        return max(0, full_at - self._clock()) / SECOND


def _create_file() -> int:
    """Return a nameless file, in memory if possible; untouched parts take no space."""
    if sys.platform == "linux":
        return os.memfd_create("productgraph-buckets")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
