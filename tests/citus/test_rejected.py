"""Rejected events, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_rejected

globals().update(borrow(test_rejected))
