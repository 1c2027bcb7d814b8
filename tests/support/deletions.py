"""A database, both providers' stand-ins for deletions, and lanes that ask one of the other."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.config import DeletionAccess
from server.events.persons import Person
from server.forwarding.deletion_lane import DeletionLane
from server.forwarding.http_client import Transport
from server.forwarding.providers.amplitude_deletions import AmplitudeDeletions
from server.forwarding.providers.deletions import DeletionService
from server.forwarding.providers.mixpanel_deletions import MixpanelDeletions
from server.forwarding.queries import Queries
from server.privacy.deletion import Deletion
from server.privacy.digests import Digests
from server.storage.connection import GuardedConnection, connected, open_engine
from server.storage.person_deletions import Receipt
from server.storage.provider_deletions import ProviderDeletion, read_provider_deletions
from tests.support.database import PROVIDERS
from tests.support.deletion_servers import DeletionServer
from tests.support.persons import PersonDatabase

PRIVACY_SECRET = "0123456789abcdef0123456789abcdef"
LATER = "UPDATE person_deletions SET deleted_at = now() - interval '1 hour'"
SERVICES: Mapping[str, type[AmplitudeDeletions | MixpanelDeletions]] = {
    "amplitude": AmplitudeDeletions,
    "mixpanel": MixpanelDeletions,
}


def build_service(name: str, access: DeletionAccess) -> DeletionService:
    """Return what asks a provider to delete persons."""
    return SERVICES[name](access)


def enable_deletions(servers: Mapping[str, DeletionServer]) -> dict[str, str]:
    """Return the settings of a process that asks these servers, and forwards no events."""
    keys = {"amplitude": "AMPLITUDE_API_KEY", "mixpanel": "MIXPANEL_TOKEN"}
    secrets = {"amplitude": "AMPLITUDE_SECRET_KEY", "mixpanel": "MIXPANEL_GDPR_TOKEN"}
    settings = {"PRIVACY_SECRET": PRIVACY_SECRET}
    for name, server in servers.items():
        settings |= {keys[name]: server.project_key, secrets[name]: server.secret}
        settings[f"{name.upper()}_DELETION_ENDPOINT"] = server.url
    return settings


@dataclass(frozen=True)
class DeletionBench(PersonDatabase):
    """A database from which persons are deleted, and the servers that are asked to do the same."""

    servers: Mapping[str, DeletionServer]

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a process that asks for deletions."""
        return {"DATABASE_URL": self.url} | enable_deletions(self.servers)

    def delete(self, person: Person, providers: Sequence[str] = PROVIDERS) -> Receipt:
        """Delete a person here, so that these providers are to be asked."""
        with connected(open_engine(self.url)) as connection:
            for _ in range(2):
                deletion = Deletion(connection, person, Digests(PRIVACY_SECRET), lambda _: None)
                receipt = deletion.run(wait=False, providers=providers)
                self.query(LATER)
        return receipt

    def ask(
        self, name: str, access: DeletionAccess | None = None, secret: str = PRIVACY_SECRET
    ) -> bool:
        """Let a new lane ask once; return whether anything was due."""
        access = access or self.servers[name].access()

        async def ask() -> bool:
            transport, connection = Transport(1), GuardedConnection(open_engine(self.url))
            lane = DeletionLane(
                build_service(name, access),
                transport,
                Queries(connection),
                Digests(secret),
                asyncio.Event(),
            )
            try:
                return await lane.ask_next()
            finally:
                await transport.close()
                connection.close()

        return asyncio.run(ask())

    def read(self, receipt: Receipt) -> list[ProviderDeletion]:
        """Return what the providers were asked for a receipt."""
        with connected(open_engine(self.url)) as connection:
            return list(read_provider_deletions(connection, [receipt.id])[receipt.id])

    def hasten(self) -> None:
        """End every wait."""
        self.query("UPDATE provider_deletions SET due_at = now() WHERE due_at IS NOT NULL")
        self.query("UPDATE forward_lanes SET deletions_after = NULL")
