"""What the harness does to the machine that it runs on."""

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]


def is_listening(process: psutil.Process) -> bool:
    """Return whether a process listens on a TCP port; False if it has gone."""
    try:
        return any(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp"))
    except psutil.Error:
        return False


@contextmanager
def mounted(directory: Path, megabytes: int) -> Iterator[None]:
    """Mount a file system of this size at the directory as long as the context lasts."""
    size = f"size={megabytes}m,mode=0711"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "torture", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def find_mount_problem() -> str | None:
    """Return why no file system can be mounted here, or None if one can."""
    mount = shutil.which("mount")
    if mount is None or sys.platform != "linux":
        return "there is no mount command for a small file system"
    with tempfile.TemporaryDirectory() as directory:
        command = [mount, "-t", "tmpfs", "-o", "size=1m", "torture", directory]
        mounting = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounting.returncode:
            return f"a small file system cannot be mounted: {mounting.stderr.strip()}"
        subprocess.run(["umount", directory], check=True)
    return None


@contextmanager
def frozen(processes: list[psutil.Process]) -> Iterator[None]:
    """Stop all of them as long as the context lasts, beginning with the one that starts others."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
