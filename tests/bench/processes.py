"""What processes use: CPU time, memory, connections."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_MEGABYTE = 1_000_000


def read_cpu_seconds(root: int) -> float:
    """Return the CPU time of a process and all its descendants, including those that ended."""
    process = psutil.Process(root)
    total = sum(process.cpu_times()[:4])  # user and system, its own and its ended children's
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += sum(child.cpu_times()[:4])
    return float(total)


def read_all_cpu_seconds(roots: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return the CPU time of several such families, by their names."""
    return {name: sum(map(read_cpu_seconds, pids)) for name, pids in roots.items()}


def reset_peak_memory(pids: Sequence[int]) -> None:
    """Start `read_peak_memory` anew (man 5 proc, clear_refs)."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def read_peak_memory(pids: Sequence[int]) -> float:
    """Return the highest peak of resident memory of these processes, in MB of 1,000,000 bytes."""
    return max(_read_status(pid, "VmHWM") for pid in pids)


def read_memory(pids: Sequence[int]) -> float:
    """Return the most resident memory of any of these processes, in MB of 1,000,000 bytes."""
    return max(_read_status(pid, "VmRSS") for pid in pids)


def _read_status(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kilobytes) * 1024 / _MEGABYTE


def find_owner(client_port: int, pids: Sequence[int]) -> int | None:
    """Return the process that has accepted the connection from a port of this machine."""
    for pid in pids:
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.raddr and connection.raddr.port == client_port:
                return pid
    return None


def find_client_ports(server_port: int) -> set[int]:
    """Return the ports of this process's connections to a server."""
    connections = psutil.Process().net_connections("tcp")
    return {c.laddr.port for c in connections if c.raddr and c.raddr.port == server_port}
