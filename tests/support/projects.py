"""Projects with keys, which the tests of a service send their events for."""

import uuid
from dataclasses import dataclass

from server.storage.connection import connected, open_engine
from server.storage.keys import create_key
from tests.support.services import Service


@dataclass(frozen=True)
class Project:
    """A project and one of its keys."""

    id: str
    key: str


def create_project(service: Service) -> Project:
    """Create a project of any service, with a key."""
    name = f"proj_{uuid.uuid4().hex[:12]}"
    with connected(open_engine(service.database_url)) as connection:
        return Project(name, create_key(connection, name, "test"))
