"""Without Citus, nothing is distributed, and that is said."""

from collections.abc import Callable

import pytest

from server.storage.citus import is_distributed
from server.storage.connection import Engine, connected
from server.storage.distribution import distribute, find_undone
from server.storage.errors import DatabaseError


def look(engine: Engine) -> object:
    """Ask what is left to do."""
    with connected(engine) as connection:
        return find_undone(connection)


@pytest.mark.parametrize("run", [look, lambda engine: list(distribute(engine, 4))])
def test_a_database_without_citus_is_not_distributed(
    run: Callable[[Engine], object], engine: Engine
) -> None:
    """A plain PostgreSQL is not taken for a cluster, and what needs one says so."""
    with connected(engine) as connection:
        assert not is_distributed(connection)
    with pytest.raises(DatabaseError, match="CREATE EXTENSION citus"):
        run(engine)
