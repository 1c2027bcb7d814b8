"""The keys in memory, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.ingest import test_keys

globals().update(borrow(test_keys))
