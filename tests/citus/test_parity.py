"""What HTTP and gRPC have in common, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_parity

globals().update(borrow(test_parity))
