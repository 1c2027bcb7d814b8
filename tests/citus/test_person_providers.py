"""Deletions at providers, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_person_providers

globals().update(borrow(test_person_providers))
