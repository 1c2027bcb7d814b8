"""PostgreSQL, and all SQL."""
