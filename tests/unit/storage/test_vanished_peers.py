"""A peer that vanishes, with its network and without a word, holds its events for seconds only."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest

from productgraph.v1.event_pb2 import Event
from server.storage import cluster
from server.storage.connection import Engine, connected, open_engine
from server.storage.embedded import EmbeddedPostgres
from server.storage.errors import Conflict, RowLocked
from server.storage.events import EventStore
from server.storage.migrate import migrate
from tests.support.events import ENCODER, encode_message, make_message
from tests.support.holder import HOLDING, POINTS
from tests.support.network import Namespace, find_namespace_problem, opened_namespace
from tests.support.services import ROOT, clean_environment, query, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_namespace_problem() is not None, reason=f"no namespace: {find_namespace_problem()}"
    ),
]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """Provide a machine that can vanish."""
    with opened_namespace() as namespace:
        yield namespace


@pytest.fixture
def engine(namespace: Namespace, open_directory: Path) -> Iterator[Engine]:
    """Provide a PostgreSQL of its own, which that machine reaches too."""
    directory = open_directory / namespace.name
    with (
        patch.dict(cluster._SETTINGS, listen_addresses=namespace.host),
        EmbeddedPostgres(directory, create=True) as server,
    ):
        with (directory / "postgres/pg_hba.conf").open("a") as file:
            file.write(f"host all all {namespace.host}/30 trust\n")
        engine = open_engine(server.url)
        query(engine, "SELECT pg_reload_conf()")
        migrate(engine)
        yield engine


@contextmanager
def holding(namespace: Namespace, point: str, event: Event) -> Iterator[None]:
    """Have a process on that machine store an event, and stop at the point."""
    url = f"postgresql://productgraph@{namespace.host}/productgraph"
    program = [sys.executable, "-m", "tests.support.holder"]
    with subprocess.Popen(
        namespace.wrap([*program, url, point, event.SerializeToString().hex()]),
        cwd=ROOT,
        env=clean_environment({}),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == HOLDING
        try:
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("point", POINTS)
def test_a_vanished_peer_lets_go_of_its_events(
    point: str, namespace: Namespace, engine: Engine
) -> None:
    """What a vanished peer holds can be stored within seconds, without anybody ending it."""
    event = make_message("p", "held")
    with holding(namespace, point, event):
        save = saver(engine, event)
        with pytest.raises(RowLocked):
            save()
        namespace.vanish()

        def is_stored() -> bool:
            with suppress(Conflict):
                save()
                return True
            return False

        wait_until(is_stored, seconds=60)
        assert query(engine, "SELECT event_id FROM events") == [("held",)]


def saver(engine: Engine, event: Event) -> Callable[[], None]:
    """Return what stores the event, unless somebody else holds it."""

    def save() -> None:
        with connected(engine) as connection:
            EventStore(ENCODER.columns).save(connection, [encode_message(event)], 10, 0.1)

    return save
