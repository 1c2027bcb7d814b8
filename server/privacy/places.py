"""The places in which events are kept, by the names that lines and receipts give them."""

EVENTS = "events"
OUTBOX = "outbox"
DEAD = "dead"
REJECTED = "rejected"
# Providers' answers about the events of others that name the person.
ANSWERS = "answers"
