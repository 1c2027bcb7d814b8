"""What Citus takes of the statements on the tables that it does not distribute."""

import pkgutil
import re
from importlib import import_module

import pytest
from psycopg2.errors import FeatureNotSupported
from sqlalchemy import TextClause
from sqlalchemy.exc import DBAPIError

from server import storage
from server.storage.connection import Engine
from tests.citus.borrowing import borrow

borrow(storage)  # skips all of this without a cluster

# On Citus, another one stands in for it.
REPLACED = {("event_queries", "_FIND_OLDEST")}
STATEMENTS = [
    pytest.param(value, id=f"{module.name}.{name}")
    for module in pkgutil.iter_modules(storage.__path__)
    for name, value in vars(import_module(f"server.storage.{module.name}")).items()
    if isinstance(value, TextClause) and (module.name, name) not in REPLACED
]


def find_refusal(engine: Engine, statement: TextClause) -> str | None:
    """Return why Citus does not support a statement, if it does not."""
    values = dict.fromkeys(re.findall(r"(?<!:):([a-z_]+)", str(statement)))
    with engine.connect() as connection:
        try:
            connection.execute(statement, values)
        except DBAPIError as error:
            return str(error.orig) if isinstance(error.orig, FeatureNotSupported) else None
        finally:
            connection.rollback()
    return None


@pytest.mark.parametrize("statement", STATEMENTS)
def test_citus_supports_the_form_of_each_statement(statement: TextClause, engine: Engine) -> None:
    """Whatever else a statement without values meets, Citus does not refuse its form."""
    assert find_refusal(engine, statement) is None
