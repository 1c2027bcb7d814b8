"""Points at which a process can be made to die, for the tests of what a crash leaves behind.

Off unless PRODUCTGRAPH_FAILPOINTS names a directory when the process starts: then one that reaches
a point, and finds a file of the point's name there, takes the file away and is killed at once. Of
several processes exactly one finds it. A point that is off costs a call of an empty function.
"""

import os
import signal
from collections.abc import Callable

# The events and their outbox rows are written, and not yet committed.
BEFORE_COMMIT = "before-commit"
# They are committed, and nobody has been answered.
AFTER_COMMIT = "after-commit"
# A provider has answered, and that is not recorded.
AFTER_PROVIDER = "after-provider"


def _pass(_point: str) -> None:
    """Nothing happens."""


def _die_where_armed(directory: str) -> Callable[[str], None]:
    def reach(point: str) -> None:
        try:
            os.unlink(os.path.join(directory, point))
        except OSError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    return reach


_directory = os.environ.get("PRODUCTGRAPH_FAILPOINTS")

reach: Callable[[str], None] = _die_where_armed(_directory) if _directory else _pass
