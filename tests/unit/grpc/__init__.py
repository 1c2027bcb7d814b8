"""Tests of server.grpc."""
