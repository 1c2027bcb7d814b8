"""The service under attack: real processes, two workers, the embedded PostgreSQL."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg2

from tests.bench.processes import read_memory, read_peak_memory, reset_peak_memory
from tests.support.projects import Project, create_project
from tests.support.services import ROOT, Service, running_service

_WORKERS = 2
_ENDED = "a worker has ended"


@dataclass(frozen=True)
class Target:
    """A running service and the processes of its workers."""

    service: Service
    workers: Sequence[int]
    port: int
    grpc_target: str

    def create_project(self) -> Project:
        """Create a project for one campaign, with a key."""
        return create_project(self.service)

    def count_events(self, project: Project) -> int:
        """Return how many events of a project are stored."""
        statement = "SELECT count(*) FROM events WHERE project_id = %s"
        with closing(psycopg2.connect(self.service.database_url)) as connection:
            cursor = connection.cursor()
            cursor.execute(statement, [project.id])
            return int(cursor.fetchone()[0])  # type: ignore[index]

    def execute(self, statement: str) -> None:
        """Run a statement in the service's database."""
        with closing(psycopg2.connect(self.service.database_url)) as connection:
            connection.autocommit = True
            connection.cursor().execute(statement)

    def find_postgres(self) -> list[psutil.Process]:
        """Return all processes of the database, the postmaster first."""
        with closing(psycopg2.connect(self.service.database_url)) as connection:
            postmaster = psutil.Process(connection.info.backend_pid).parent()
        return [postmaster, *postmaster.children()]

    def find_problem(self) -> str | None:
        """Return what has become of the original workers, if they are not all well."""
        now = {worker.pid for worker in self.service.find_workers()}
        return None if now == set(self.workers) else _ENDED

    def reset_peak_memory(self) -> None:
        """Start `read_peak_memory` anew."""
        reset_peak_memory(self.workers)

    def read_peak_memory(self) -> float:
        """Return the highest peak of resident memory of a worker, in MB of 1,000,000 bytes."""
        return read_peak_memory(self._living())

    def read_memory(self) -> float:
        """Return the most resident memory of any worker now, in MB of 1,000,000 bytes."""
        return read_memory(self._living())

    def _living(self) -> list[int]:
        return [worker.pid for worker in self.service.find_workers()]


@contextmanager
def running_target(root: Path = ROOT) -> Iterator[Target]:
    """Run the service of the code in `root`, on a database of its own."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o711)  # PostgreSQL may run under an account of its own
        settings = {"DATA_DIR": str(Path(directory, "data")), "WORKERS": str(_WORKERS)}
        with running_service(settings, root) as service:
            workers = [worker.pid for worker in service.find_workers()]
            yield Target(service, workers, service.http_port, service.grpc_target)
