"""Tests of server.events."""
