"""Instructions that an event takes on its way from bytes to row, counted by valgrind.

They are the same however busy a machine is, unlike times. `python -m tests.bench.instructions
PROTOCOL KIND BATCHES` goes that way, for `count_instructions` to start it.
"""

import gc
import json
import os
import re
import subprocess
import sys
from typing import Any

from server.deadline import NEVER
from server.events.copy_rows import Row, RowEncoder
from server.events.json_codec import JsonCodec
from server.events.protobuf_codec import ProtobufCodec
from server.events.quick_json import QuickReader
from server.events.quick_protobuf import QuickProtobufReader
from server.events.schema import EVENT_SCHEMA
from server.ingest.service import Codec
from server.protocols import GRPC, HTTP
from tests.bench.events import KINDS, PROJECT, encode_protobuf
from tests.support.services import ROOT, clean_environment

_EVENTS = 1000
_BATCHES = 2
_COUNT = re.compile(r"I\s+refs:\s+([\d,]+)")


def count_instructions(kind: str, protocol: str = HTTP) -> int:
    """Return the instructions of one event of a batch of 1,000; raises OSError without valgrind.

    What the program does besides is the same in a longer run, and so left out.
    """
    _run(kind, protocol, 0)  # compiles what has not been imported before
    once, longer = _run(kind, protocol, 1), _run(kind, protocol, 1 + _BATCHES)
    return (longer - once) // (_BATCHES * _EVENTS)


def _run(kind: str, protocol: str, batches: int) -> int:
    finished = subprocess.run(
        [
            *("valgrind", "--tool=cachegrind", "--cache-sim=no"),
            f"--cachegrind-out-file={os.devnull}",
            *(sys.executable, "-m", "tests.bench.instructions", protocol, kind, str(batches)),
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


def main(protocol: str, kind: str, batches: int) -> None:
    """Read batches, each into its rows and the buffer that COPY takes."""
    codec, body = _PREPARE[protocol](KINDS[kind](_EVENTS))
    gc.disable()  # whose runs fall into one batch or another
    for _ in range(batches):
        events = codec.parse_batch(body, NEVER, PROJECT).events
        rows = [event for event in events if isinstance(event, Row)]
        assert len(rows) == _EVENTS
        "".join([row.text for row in rows]).encode()


def _prepare_json(events: list[dict[str, Any]]) -> tuple[Codec, bytes]:
    quick = QuickReader(EVENT_SCHEMA, RowEncoder(EVENT_SCHEMA).columns, keep_encoded=False)
    body = json.dumps({"events": events}, separators=(",", ":")).encode()
    return JsonCodec(EVENT_SCHEMA, quick), body


def _prepare_protobuf(events: list[dict[str, Any]]) -> tuple[Codec, bytes]:
    quick = QuickProtobufReader(EVENT_SCHEMA, keep_encoded=False)
    return ProtobufCodec(EVENT_SCHEMA, quick), bytes(encode_protobuf(events).buffer)


_PREPARE = {HTTP: _prepare_json, GRPC: _prepare_protobuf}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
