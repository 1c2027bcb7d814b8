"""Retention, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_retention

globals().update(borrow(test_retention))
