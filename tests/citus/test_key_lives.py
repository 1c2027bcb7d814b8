"""The lives of keys, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_key_lives

globals().update(borrow(test_key_lives))
