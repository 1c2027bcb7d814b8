"""Locks that processes hold on files. They end with the process, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SharedUse:
    """What processes use together: whoever leaves can tell whether anybody is left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def joined(self) -> bool:
        """Whether this process is one of them."""
        return self._descriptor is not None

    def join(self) -> None:
        """Make this process one of them."""
        self._descriptor = _open_file(self._path)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def leave(self) -> None:
        """Undo `join`."""
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None

    def is_deserted(self) -> bool:
        """Return whether no process uses it. Call it when none can join."""
        try:
            with locked(self._path, wait=False):
                return True
        except BlockingIOError:
            return False


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold the lock of a file exclusively, and yield the file's descriptor.

    Raises BlockingIOError if it is held by another process and must not be waited for.
    """
    descriptor = _open_file(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


def _open_file(path: Path) -> int:
    # The directory may be somebody else's: follow no link that he has planted.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
