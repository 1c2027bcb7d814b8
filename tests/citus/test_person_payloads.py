"""A person's events in the outbox, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.storage import test_person_payloads

globals().update(borrow(test_person_payloads))
