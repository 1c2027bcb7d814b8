"""The servers that are measured, each in processes of its own."""

import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.database import BenchDatabase
from tests.support.services import clean_environment, running_service


@dataclass(frozen=True)
class Server:
    """Ports by protocol; `process` is the parent of the `workers`, or their only one."""

    ports: dict[str, int]
    process: int
    workers: Sequence[int]


@contextmanager
def running_workers(
    data_directory: Path, workers: int, settings: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run the service as `scripts/serve` does, with this many workers and further `settings`."""
    own = {"DATA_DIR": str(data_directory), "WORKERS": str(workers)}
    with running_service(own | dict(settings or {})) as service:
        grpc_port = int(service.grpc_target.rpartition(":")[2])
        ports = {"http": service.http_port, "grpc": grpc_port, "stream": grpc_port}
        pids = [worker.pid for worker in service.find_workers()]
        yield Server(ports, service.process.pid, pids)


@contextmanager
def running_baseline(database: BenchDatabase, workers: int) -> Iterator[Server]:
    """Run the program of `baseline.py` with this many workers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.baseline", database.url, str(port), str(workers)],
        env=clean_environment({}),
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdout is not None
            pids = [int(process.stdout.readline()) for _ in range(workers)]
            yield Server({"http": port}, process.pid, pids)
        finally:
            process.terminate()
