"""A person's data: found wherever it is kept, given out, deleted, and kept from coming in."""
