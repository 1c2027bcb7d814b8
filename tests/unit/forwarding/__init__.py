"""Tests of server.forwarding."""
