"""The keeping of rejected events, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.ingest import test_rejection_writer

globals().update(borrow(test_rejection_writer))
