"""The partitions, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.storage import test_partitions

globals().update(borrow(test_partitions))
