"""The usage of projects, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.console import test_usage

WITHOUT = {"test_counts_without_types_read_no_table": "the statistics are of a table without rows"}

globals().update(borrow(test_usage, WITHOUT))
