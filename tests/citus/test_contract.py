"""The contract, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_contract

globals().update(borrow(test_contract))
