"""Points at which a process can be made to die, to test what a crash leaves behind.

They are off unless PRODUCTGRAPH_FAILPOINTS names a directory when the process starts. A process
that then reaches a point and finds a file of the point's name there removes the file and is killed
at once; of several processes, exactly one finds it. A point that is off costs a call of an empty
function.
"""

import os
import signal
from collections.abc import Callable

# The events and their outbox rows are written but not committed.
BEFORE_COMMIT = "before-commit"
# They are committed, but nobody has been answered.
AFTER_COMMIT = "after-commit"
# A provider has answered, but its answer is not recorded.
AFTER_PROVIDER = "after-provider"
# A step of the deletion of a person's data is committed.
AFTER_DELETION = "after-deletion"


def _pass(_point: str) -> None:
    """Do nothing."""


def _die_if_armed(directory: str) -> Callable[[str], None]:
    def reach(point: str) -> None:
        try:
            os.unlink(os.path.join(directory, point))
        except OSError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    return reach


_directory = os.environ.get("PRODUCTGRAPH_FAILPOINTS")

reach: Callable[[str], None] = _die_if_armed(_directory) if _directory else _pass
