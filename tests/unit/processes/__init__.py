"""Tests of server.processes."""
