"""Token buckets that the processes of a machine share.

A full bucket holds one second's worth of its rate. Its whole state is the moment at which it will
be full again (GCRA: https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm): nothing refills it.
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

SECOND = 1_000_000_000  # all times here are nanoseconds
_STATE = struct.Struct("=q")
# Each node of Citus numbers from a multiple of 2^48 on, and numbers here are twice those: what it
# has first must not share the buckets of what the others have first. The factor is even, since odd
# numbers are another kind.
_NODE_BITS, _SPREAD = 49, 2 * 0x9E37_79B1


def take(full_at: int, now: int, cost: int) -> int | None:
    """Return when a bucket is full again if `cost` is taken now, or None if it holds too little.

    `cost` is the time in which as much flows in. More than a bucket holds may be taken from a full
    one; it then stays empty until that has flowed in.
    """
    if full_at <= now:
        return now + cost
    if full_at - now + cost <= SECOND:
        return full_at + cost
    return None


class BucketTable:
    """Buckets by number in shared memory, all full at first.

    Every process that inherits the file descriptor sees the same buckets. Numbers that differ by
    the table's size share a bucket.
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
        """Take from a bucket as `take` does. Return False if it holds too little."""
        place = self._find_place(number)
        # The file's lock keeps out other processes, but not other threads of this one. The kernel
        # releases it if its process dies.
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
        """Return how long a bucket takes to fill up if nothing more is taken; 0 if it is full."""
        full_at: int = _STATE.unpack_from(self._memory, self._find_place(number))[0]
        return max(0, full_at - self._clock()) / SECOND

    def _find_place(self, number: int) -> int:
        spread = (number >> _NODE_BITS) * _SPREAD
        return (number + spread) % self.SIZE * _STATE.size


def _create_file() -> int:
    """Open a file without a name, in memory if possible; pages never written take no space."""
    if sys.platform == "linux":
        return os.memfd_create("productgraph-buckets")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
