"""Tests of server.console."""
