"""Instructions that an event takes on its way from bytes to row, counted by valgrind.

They are the same however busy a machine is, unlike times. `python -m tests.bench.instructions KIND
BATCHES` goes that way, for `count_instructions` to start it.
"""

import gc
import json
import os
import re
import subprocess
import sys

from server.events.copy_rows import Row, RowEncoder
from server.events.json_codec import JsonCodec
from server.events.quick_json import QuickReader
from server.events.schema import EVENT_SCHEMA
from tests.bench.events import KINDS, PROJECT
from tests.support.services import ROOT, clean_environment

_EVENTS = 1000
_BATCHES = 2
_COUNT = re.compile(r"I\s+refs:\s+([\d,]+)")


def count_instructions(kind: str) -> int:
    """Return the instructions of one event of a batch of 1,000; raises OSError without valgrind.

    What the program does besides is the same in a longer run, and so left out.
    """
    once, longer = _run(kind, 1), _run(kind, 1 + _BATCHES)
    return (longer - once) // (_BATCHES * _EVENTS)


def _run(kind: str, batches: int) -> int:
    finished = subprocess.run(
        [
            *("valgrind", "--tool=cachegrind", "--cache-sim=no"),
            f"--cachegrind-out-file={os.devnull}",
            *(sys.executable, "-m", "tests.bench.instructions", kind, str(batches)),
        ],
        cwd=ROOT,
        env=clean_environment({"PYTHONHASHSEED": "0"}),
        capture_output=True,
        text=True,
        check=True,
    )
    match = _COUNT.search(finished.stderr)
    assert match is not None, finished.stderr
    return int(match[1].replace(",", ""))


def main(kind: str, batches: int) -> None:
    """Read batches, each into its rows and the buffer that COPY takes."""
    body = json.dumps({"events": KINDS[kind](_EVENTS)}, separators=(",", ":")).encode()
    columns = RowEncoder(EVENT_SCHEMA).columns
    codec = JsonCodec(EVENT_SCHEMA, QuickReader(EVENT_SCHEMA, columns, keep_encoded=False))
    gc.disable()  # whose runs fall into one batch or another
    for _ in range(batches):
        events = codec.parse_batch(body, project_id=PROJECT).events
        rows = [event for event in events if isinstance(event, Row)]
        assert len(rows) == _EVENTS
        "".join([row.text for row in rows]).encode()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
