"""Logs on a terminal."""

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

LOG = """
import logging
from server.logs import configure_logs
configure_logs("INFO")
logging.getLogger("productgraph").info("worker ready", extra={"worker_pid": 7})
logging.getLogger("productgraph").info("forged\\n12:00:00 INFO")
"""


def read_to_end(terminal: int) -> str:
    """Return all that was written to a terminal, whose other end is closed."""
    written = b""
    with os.fdopen(terminal, "rb", buffering=0) as output, suppress(OSError):
        while part := output.read(4096):
            written += part
    return written.decode()


def test_a_line_on_a_terminal_has_its_time_once() -> None:
    """On a terminal a line has the time, the level, the message and its fields, each once."""
    terminal, other_end = pty.openpty()
    subprocess.run([sys.executable, "-c", LOG], stderr=other_end, check=True)
    os.close(other_end)
    lines = read_to_end(terminal).splitlines()
    assert re.fullmatch(r"[0-9:]{8} INFO    worker ready worker_pid=7", lines[0])
    assert re.fullmatch(r"[0-9:]{8} INFO    forged\\x0a12:00:00 INFO", lines[1])
    assert len(lines) == 2
