"""The history of forwarding, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.storage import test_forward_history

globals().update(borrow(test_forward_history))
