"""`productgraph distribute` on a cluster."""

from collections.abc import Callable

import pytest
from sqlalchemy import text

from server.storage import distribution
from server.storage.citus import is_distributed
from server.storage.connection import Engine, connected, open_engine
from server.storage.distribution import distribute, find_undone
from server.storage.errors import Refused
from server.storage.events import EventStore
from server.storage.migrate import migrate
from tests.citus.borrowing import borrow
from tests.citus.conftest import Cluster
from tests.support.events import ENCODER, make_row
from tests.support.services import query, run_command

borrow(distribution)  # skips all of this without a cluster


@pytest.fixture
def url(create_database: Callable[[], str]) -> str:
    """Return a database with all tables on the coordinator, and 500 events."""
    url = create_database()
    engine = open_engine(url)
    migrate(engine)
    rows = [make_row(f"p{number % 50}", f"e{number}") for number in range(500)]
    with connected(engine) as connection:
        EventStore(ENCODER.columns).save(connection, rows, 30)
    return url


@pytest.fixture
def engine(url: str) -> Engine:
    """How the service connects to it."""
    return open_engine(url)


def test_distributing_keeps_every_event_and_can_be_repeated(engine: Engine) -> None:
    """All events are on the nodes, none is left behind, and the second time nothing is done."""
    done = list(distribute(engine, 4))
    assert done[0] == "distributed the table events by project_id: 4 shards on 2 nodes"
    assert query(engine, "SELECT count(*) FROM events") == [(500,)]
    with connected(engine) as connection:
        assert is_distributed(connection)
        assert find_undone(connection) == []
    assert list(distribute(engine, 4)) == []


@pytest.mark.parametrize("number", range(8))
def test_an_interrupted_distribution_is_completed(number: int, engine: Engine) -> None:
    """Whatever step it ended at, what is left is named, and the next run does it."""
    steps = distribute(engine, 4)
    for _ in range(number):
        next(steps)
    steps.close()
    with connected(engine) as connection:
        assert find_undone(connection)
    list(distribute(engine, 4))
    assert query(engine, "SELECT count(*) FROM events") == [(500,)]


def test_checking_a_distribution_changes_nothing(url: str, engine: Engine) -> None:
    """`--check` fails until all is distributed, and names what is not."""
    settings = {"DATABASE_URL": url}
    checked = run_command("distribute", "--check", settings=settings)
    assert checked.returncode == 1
    assert "the table events is on one node" in checked.stderr
    with connected(engine) as connection:
        assert not is_distributed(connection)
    assert run_command("distribute", "--shards", "4", settings=settings).returncode == 0
    assert run_command("distribute", "--check", settings=settings).returncode == 0


def test_a_check_on_the_nodes_refuses_its_own_data(engine: Engine) -> None:
    """What a constraint of an operator's forbids is refused at once, and not tried again."""
    list(distribute(engine, 4))
    with connected(engine) as connection:
        connection.exec_driver_sql("ALTER TABLE events ADD CHECK (event_name <> 'odd')")
    with pytest.raises(Refused), connected(engine) as connection:
        EventStore(ENCODER.columns).save(connection, [make_row("p", "e", event_name="odd")], 30)


@pytest.mark.parametrize(
    "command", [["distribute"], ["migrate"], ["retention", "--keep", "90d"]], ids=" ".join
)
def test_only_the_coordinator_changes_tables(
    command: list[str], cluster: Cluster, url: str, engine: Engine
) -> None:
    """On a worker each command says in one line which address is needed."""
    list(distribute(engine, 4))
    done = run_command(*command, settings={"DATABASE_URL": cluster.name_on_worker(url)})
    wanted = "productgraph: this node is not the coordinator: DATABASE_URL has to name that\n"
    assert (done.returncode, done.stderr) == (1, wanted)


def test_the_doctor_tells_what_is_left_to_distribute(url: str, engine: Engine) -> None:
    """It names the command while events are on one node, and no longer once that has run."""

    def find_nodes() -> str:
        lines = run_command("doctor", settings={"DATABASE_URL": url}).stdout.splitlines()
        return next(line for line in lines if " nodes: " in line)

    assert find_nodes() == "todo  nodes: run distribute: the table events is on one node"
    list(distribute(engine, 4))
    assert find_nodes() == "ok    nodes: the tables are distributed"


def test_tables_of_later_versions_become_known_too(engine: Engine) -> None:
    """What a migration adds is known to all nodes once `migrate` has run."""
    list(distribute(engine, 4))
    with connected(engine) as connection:
        connection.execute(text("CREATE TABLE later (id bigint PRIMARY KEY)"))
    with connected(engine) as connection:
        assert find_undone(connection) == ["the other nodes do not know the table later"]
    migrate(engine)
    with connected(engine) as connection:
        assert find_undone(connection) == []
