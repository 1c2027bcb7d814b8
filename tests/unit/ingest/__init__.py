"""Tests of server.ingest."""
