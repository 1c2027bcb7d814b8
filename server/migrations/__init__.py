"""The tables' history: one ordered revision for each change of the schema in PostgreSQL."""
