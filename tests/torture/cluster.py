"""All that a fault may hit: service, database, forwarders, providers, and the proxies between."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import psutil  # type: ignore[import-untyped]
import psycopg2
from psycopg2.extensions import connection as Connection

import server.storage.cluster
from server.storage.connection import connected, open_engine
from server.storage.embedded import EmbeddedPostgres
from server.storage.keys import create_key
from tests.support.network import Namespace, opened_namespace
from tests.support.patience import PATIENCE
from tests.support.ports import find_ports
from tests.support.postgres_server import find_processes
from tests.support.services import ROOT, Service, ask, clean_environment, wait_until
from tests.torture.clients import Client, GrpcClient, HttpClient
from tests.torture.events import PROJECT
from tests.torture.machine import is_listening, mounted
from tests.torture.pair import Pair
from tests.torture.providers import AMPLITUDE_KEY, MIXPANEL_TOKEN, open_providers
from tests.torture.proxy import Proxy, to_port, to_socket

T = TypeVar("T")

DATABASE_PASSWORD = "database-s3cret-71c0"
WORKERS = 2
_HTTP_CLIENTS, _GRPC_CLIENTS = 5, 3
_START_SECONDS = 60.0 * PATIENCE
_LEAVE_SECONDS = 35.0 * PATIENCE
_QUERY_SECONDS = 30.0 * PATIENCE


@dataclass(frozen=True)
class Setup:
    """How a cluster is built.

    `has_proxied_database`: the harness runs the PostgreSQL, behind a proxy, and not the service.
    `disk_megabytes`: the data directory is a file system of its own, of this size.
    `has_network`: a namespace, from which that PostgreSQL can be reached, is a peer's machine.
    `has_pair`: the harness runs a primary and its synchronous standby, each behind a proxy.
    """

    has_proxied_database: bool = False
    disk_megabytes: int = 0
    has_network: bool = False
    has_pair: bool = False


class Cluster:
    """Running processes of the code in `root`, and how to reach, kill and revive them."""

    def __init__(self, directory: Path, setup: Setup, root: Path, seed: str) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.failpoints = directory / "failpoints"
        self.logs = directory / "logs"
        self.providers = open_providers()
        self.provider_proxies: dict[str, Proxy] = {}
        self.key = ""
        self.extra_forwarders: list[subprocess.Popen[bytes]] = []
        self._setup = setup
        self._root = root
        self._seed = seed
        self._proxy: Proxy | None = None
        self._namespace: Namespace | None = None
        self._pair: Pair | None = None
        self._ports = find_ports(2)
        self._service: Service | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run all of it as long as the context lasts."""
        for directory in (self.data, self.failpoints, self.logs):
            directory.mkdir()
        self.data.chmod(0o711)
        with ExitStack() as stack:
            if self._setup.disk_megabytes:
                stack.enter_context(mounted(self.data, self._setup.disk_megabytes))
            stack.callback(self._end_database)
            for name, provider in self.providers.items():
                stack.enter_context(provider)
                proxy = Proxy(to_port(provider.port), seed=f"{self._seed}/{name}")
                self.provider_proxies[name] = stack.enter_context(proxy)
            if self._setup.has_proxied_database:
                self._open_database(stack)
            if self._setup.has_pair:
                self._pair = stack.enter_context(Pair(self.data, self._seed))
                self._run_command("migrate")
            stack.callback(self._kill_processes)
            self.start_service()
            with connected(open_engine(self.database_url)) as connection:
                self.key = create_key(connection, PROJECT, "torture")
            yield
            self._stop_processes()

    def _open_database(self, stack: ExitStack) -> None:
        if self._setup.has_network:
            self._namespace = stack.enter_context(opened_namespace())
            address = {"listen_addresses": self._namespace.host}
            stack.enter_context(patch.dict(server.storage.cluster._SETTINGS, address))
        embedded = stack.enter_context(EmbeddedPostgres(self.data, create=True))
        if self._namespace is not None:
            with (self.data / "postgres/pg_hba.conf").open("a") as file:
                file.write(f"host all all {self._namespace.host}/30 trust\n")
            self.query("SELECT pg_reload_conf()")
        path = Path(embedded.url.partition("host=")[2].partition("&")[0].replace("%2F", "/"))
        proxy = Proxy(
            to_socket(path / ".s.PGSQL.5432"), seed=f"{self._seed}/database", is_database=True
        )
        self._proxy = stack.enter_context(proxy)
        self._run_command("migrate")

    @property
    def service(self) -> Service:
        """The service, running or dead."""
        assert self._service is not None
        return self._service

    @property
    def database_proxy(self) -> Proxy:
        """The proxy between service and database, if the setup has one."""
        assert self._proxy is not None
        return self._proxy

    @property
    def pair(self) -> Pair:
        """The primary and its standby, if the setup has them."""
        assert self._pair is not None
        return self._pair

    @property
    def namespace(self) -> Namespace:
        """The machine of a peer, if the setup has one."""
        assert self._namespace is not None
        return self._namespace

    def spawn_peer(self, program: list[str], *arguments: str) -> "subprocess.Popen[bytes]":
        """Start a program of the tests' on the peer's machine, with the database's URL first."""
        url = f"postgresql://productgraph@{self.namespace.host}/productgraph"
        environment = clean_environment({}, self._root)
        environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
        return subprocess.Popen(
            self.namespace.wrap([*program, url, *arguments]),
            cwd=self._root,
            env=environment,
            stdout=subprocess.PIPE,
        )

    @property
    def settings(self) -> dict[str, str]:
        """The settings of the service and its forwarders."""
        database = {"DATA_DIR": str(self.data)}
        if self._proxy is not None or self._pair is not None:
            place = f"127.0.0.1:{self._proxy.port}/productgraph" if self._proxy else self.pair.place
            database = {"DATABASE_URL": f"postgresql://productgraph:{DATABASE_PASSWORD}@{place}"}
        endpoints = {
            f"{name.upper()}_ENDPOINT": f"http://127.0.0.1:{proxy.port}{self.providers[name].path}"
            for name, proxy in self.provider_proxies.items()
        }
        enabled = {f"{name.upper()}_ENABLED": "true" for name in self.providers}
        return {
            **database,
            **endpoints,
            **enabled,
            "ANALYTICS_ENABLED": "true",
            "AMPLITUDE_API_KEY": AMPLITUDE_KEY,
            "MIXPANEL_TOKEN": MIXPANEL_TOKEN,
            "WORKERS": str(WORKERS),
            "PORT": str(self._ports[0]),
            "GRPC_PORT": str(self._ports[1]),
            "PRODUCTGRAPH_FAILPOINTS": str(self.failpoints),
        }

    @property
    def secrets(self) -> list[str]:
        """All that no log may contain."""
        return [self.key, AMPLITUDE_KEY, MIXPANEL_TOKEN, DATABASE_PASSWORD]

    @property
    def database_url(self) -> str:
        """The URL of the database, which is a pair's primary, around the proxy."""
        if self._pair is not None:
            return self._pair.primary.url
        return EmbeddedPostgres(self.data, create=False).url

    def open_clients(self) -> list[Callable[[], Client]]:
        """Return what opens each of the clients of a load."""
        http, grpc = self._ports
        return [lambda: HttpClient(http, self.key)] * _HTTP_CLIENTS + [
            lambda: GrpcClient(grpc, self.key)
        ] * _GRPC_CLIENTS

    def connect(self) -> Connection:
        """Open a connection around the proxy, after waiting for the database."""
        deadline = time.monotonic() + _QUERY_SECONDS
        while True:
            try:
                return psycopg2.connect(self.database_url, connect_timeout=5)
            except psycopg2.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def wait_for_database(self) -> None:
        """Return when the database answers a query."""
        self.query("SELECT 1")

    def query(self, statement: str, *parameters: Any) -> list[Any]:
        """Run a repeatable statement, in a transaction of its own, and return its rows."""
        return self.use_connection(lambda made: _execute(made, statement, parameters))

    def use_connection(self, work: Callable[[Connection], T]) -> T:
        """Return what repeatable work yields; a connection that breaks meanwhile is replaced.

        A database that has just been killed may take a connection and die after that.
        """
        deadline = time.monotonic() + _QUERY_SECONDS
        while True:
            try:
                with closing(self.connect()) as connection:
                    return work(connection)
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                if time.monotonic() > deadline:
                    raise

    def start_service(self) -> None:
        """Start the service on the ports that it always has, and return when it is whole."""
        output, log = self.logs.parent / "banner", self.logs / "service.log"
        with output.open("wb") as stdout, log.open("ab") as stderr:
            process = self._spawn("serve", stdout=stdout, stderr=stderr)
        self._service = Service(process, self.settings, output, log)
        wait_until(self._service.is_ready, _START_SECONDS)
        self.wait_until_serving(WORKERS)

    def revive_service(self) -> None:
        """Start it again when all processes of the dead one have gone."""
        self.service.process.wait()
        left = [p for p in psutil.process_iter(["environ"]) if self._is_ours(p)]
        _, alive = psutil.wait_procs(left, _LEAVE_SECONDS)
        assert not alive, "the workers of a killed parent stay"
        self.start_service()

    def _is_ours(self, process: psutil.Process) -> bool:
        environment = process.info["environ"] or {}
        own = environment.get("PRODUCTGRAPH_FAILPOINTS") == str(self.failpoints)
        return own and process.pid not in {extra.pid for extra in self.extra_forwarders}

    def is_serving(self, workers: int) -> bool:
        """Return whether the workers listen, a forwarder runs, and the service says it is ready."""
        with suppress(psutil.Error):
            return (
                sum(map(is_listening, self.find_children("worker"))) >= workers
                and len(self.find_children("forward")) == 1
                and ask(f"{self.service.http_url}/ready") == 200
            )
        return False

    def wait_until_serving(self, workers: int = 1) -> None:
        """Wait for this many workers, while others may still be starting."""
        wait_until(lambda: self.is_serving(workers), _START_SECONDS)

    def find_children(self, command: str) -> list[psutil.Process]:
        """Return the service's workers or forwarders that are alive."""
        found = []
        with suppress(psutil.Error):
            for child in psutil.Process(self.service.process.pid).children():
                with suppress(psutil.Error):
                    if child.cmdline()[-1:] == [command]:
                        found.append(child)
        return found

    def start_forwarder(self) -> None:
        """Start a forwarder beside the service's own."""
        with (self.logs / "forwarders.log").open("ab") as log:
            process = self._spawn("forward", stdout=log, stderr=log)
        self.extra_forwarders.append(process)

    def find_postgres(self) -> list[psutil.Process]:
        """Return PostgreSQL's processes, the postmaster first; none if it is dead."""
        return find_processes(self.data / "postgres")

    def keep_logs(self, directory: Path) -> None:
        """Copy all logs to a directory, which then holds nothing else."""
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.logs, directory)
        for log in (*self.data.glob("postgres/server.log*"), *self.data.glob("*.log")):
            shutil.copy(log, directory)

    def _spawn(self, command: str, **options: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "server", command],
            cwd=self._root,
            env=clean_environment(self.settings, self._root),
            stdin=subprocess.DEVNULL,
            **options,
        )

    def _run_command(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "server", *arguments],
            cwd=self._root,
            env=clean_environment(self.settings, self._root),
            check=True,
            timeout=60 * PATIENCE,
        )

    def _stop_processes(self) -> None:
        for process in [self.service.process, *self.extra_forwarders]:
            process.terminate()
        for process in [self.service.process, *self.extra_forwarders]:
            process.wait(_LEAVE_SECONDS)

    def _kill_processes(self) -> None:
        processes = [*self.extra_forwarders]
        if self._service is not None:
            processes.append(self._service.process)
        for process in processes:
            with suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()

    def _end_database(self) -> None:
        for process in self.find_postgres():
            with suppress(psutil.Error):
                process.kill()


def _execute(connection: Connection, statement: str, parameters: Sequence[Any]) -> list[Any]:
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []
