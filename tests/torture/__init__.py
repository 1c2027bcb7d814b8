"""`scripts/torture`: faults, and what must hold after each."""
