"""The console, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_console

globals().update(borrow(test_console))
