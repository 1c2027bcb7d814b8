"""Tests of server.storage."""
