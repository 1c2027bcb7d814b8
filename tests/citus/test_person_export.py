"""The export of a person, on Citus."""

from tests.citus.borrowing import borrow
from tests.service import test_person_export

globals().update(borrow(test_person_export))
