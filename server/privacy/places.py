"""The places in which events are kept, by the names that lines and receipts give them."""

EVENTS = "events"
OUTBOX = "outbox"
DEAD = "dead"
REJECTED = "rejected"
# What a provider has answered about an event of somebody else, if it names the person.
ANSWERS = "answers"
