"""Commands on stored events, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_event_commands

globals().update(borrow(test_event_commands))
