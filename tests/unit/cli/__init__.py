"""Tests of server.cli."""
