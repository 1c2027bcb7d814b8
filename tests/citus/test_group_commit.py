"""Group commit, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.ingest import test_group_commit

globals().update(borrow(test_group_commit))
