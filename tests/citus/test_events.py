"""The writing of events, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.storage import test_events

WITHOUT = {
    "test_duplicates_switch_to_staging_for_five_seconds": "Citus takes no triggers",
}

globals().update(borrow(test_events, WITHOUT))
