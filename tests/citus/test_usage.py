"""The usage of projects, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.console import test_usage

globals().update(borrow(test_usage))
