"""A primary and its synchronous standby, of the programs that come with the embedded PostgreSQL."""

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from server.storage.accounts import Account, find_account
from server.storage.cluster import NAME, PORT
from server.storage.places import find_programs
from tests.support.patience import PATIENCE
from tests.support.postgres_server import PostgresServer, make_room
from tests.support.services import wait_until
from tests.torture.proxy import Proxy, to_socket

# A standby that is back is not to be waited for.
_SETTINGS = {"wal_retrieve_retry_interval": "200ms"}
_LOCALE = ("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
_CATCH_UP_SECONDS = 60.0 * PATIENCE
_COUNT_SYNCHRONOUS = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"


class Server(PostgresServer):
    """One of the two, with the proxies that lead to it.

    `clients` is the way of the service to it, `replication` that of a standby.
    """

    def __init__(self, directory: Path, account: Account, seed: str) -> None:
        super().__init__(directory, find_programs(account), account, _SETTINGS)
        socket = to_socket(directory / f".s.PGSQL.{PORT}")
        self.clients = Proxy(socket, seed=f"{seed}/{directory.name}")
        self.replication = Proxy(socket, seed=f"{seed}/{directory.name}/replication")

    def copy(self, primary: "Server") -> None:
        """Become a standby of that primary, whatever was here before."""
        shutil.rmtree(self.directory, ignore_errors=True)
        way = f"host=127.0.0.1 port={primary.replication.port} user={NAME}"
        options = ["--checkpoint=fast", "--write-recovery-conf", "--no-sync"]
        self.run("pg_basebackup", "-D", self.directory, "-d", way, *options)
        self.start()


class Pair:
    """A primary whose commits wait for its standby; a context manager.

    It does what Patroni does: it promotes the standby, fences the old primary, and makes that the
    new standby. A primary without a standby confirms by itself.
    """

    def __init__(self, directory: Path, seed: str) -> None:
        account = find_account(directory / "none")
        make_room(directory, account)
        self.servers = [Server(directory / name, account, seed) for name in ("a", "b")]
        self.primary, self.standby = self.servers
        self._stack = ExitStack()

    @property
    def place(self) -> str:
        """Its place in a URL, for a service: all hosts, and the one to use."""
        hosts = ",".join(f"127.0.0.1:{server.clients.port}" for server in self.servers)
        return f"{hosts}/{NAME}?target_session_attrs=read-write"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.callback(server.kill)
                stack.enter_context(server.clients)
                stack.enter_context(server.replication)
            self.primary.create(*_LOCALE)
            self.rebuild()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def promote(self) -> float:
        """Let the two change their roles; return when the standby had become the primary."""
        self.standby.promote()
        promoted_at = time.monotonic()
        self.primary, self.standby = self.standby, self.primary
        return promoted_at

    def rebuild(self) -> None:
        """End what the standby still does, and let it begin anew as a copy of the primary."""
        self.standby.kill()
        self.standby.copy(self.primary)
        self.primary.configure("synchronous_standby_names", "*")
        self.wait_for_standby()

    def wait_for_standby(self) -> None:
        """Return when the standby confirms what is committed."""
        wait_until(lambda: self.primary.query(_COUNT_SYNCHRONOUS) == [(1,)], _CATCH_UP_SECONDS)
