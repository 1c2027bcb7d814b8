"""Tests of a running service, over real sockets."""
