"""The outbox, on Citus."""

from tests.citus.borrowing import borrow
from tests.unit.storage import test_outbox

WITHOUT = {
    "test_events_and_deliveries_share_one_transaction": "each node numbers its transactions",
    "test_a_claim_reads_little_of_a_backlog": "the statistics are of a table without rows",
}

globals().update(borrow(test_outbox, WITHOUT))
