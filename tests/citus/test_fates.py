"""The fates of events, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_fates

globals().update(borrow(test_fates))
