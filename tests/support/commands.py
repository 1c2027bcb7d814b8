"""Commands of `productgraph` in processes forked from one that has imported everything."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack

from server.cli.main import MODULES

# Importing takes most of a command's time, and the tests run hundreds of commands.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([f"server.cli.{name}" for name in ("main", *MODULES)])


def fork_command(
    arguments: tuple[str, ...], environment: Mapping[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """Run a command. Raises subprocess.TimeoutExpired after `timeout` seconds."""
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.NamedTemporaryFile("r")) for _ in range(2)]
        names = [file.name for file in files]
        process = _PROCESSES.Process(target=_run, args=(arguments, dict(environment), names))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(
            arguments, process.exitcode, *[file.read() for file in files]
        )


def _run(arguments: tuple[str, ...], environment: Mapping[str, str], outputs: list[str]) -> None:
    from server.cli.main import main

    os.environ.clear()
    os.environ.update(environment)
    for stream, name in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    sys.exit(main(arguments))
