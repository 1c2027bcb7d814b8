"""The ingestion service of ProductGraph: one event schema, two protocols, one PostgreSQL."""
