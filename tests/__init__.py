"""Tests: of the parts, of a running service, and of its speed and firmness."""

import os

# Tests start programs beside their gRPC clients, whose handlers of fork() may end the new process.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
