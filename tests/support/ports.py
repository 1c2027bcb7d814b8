"""Ports for servers that are told theirs, or that start again on the same one."""

import random
import socket
from contextlib import suppress

# Below what the kernel gives to whoever asks for any port, so that a restart finds its own free.
_PORTS = range(15_000, 30_000)


def find_ports(count: int) -> list[int]:
    """Return this many ports that nobody uses, and that stay ours while our server restarts."""
    found: list[int] = []
    # Not by a seed: several runs may be side by side.
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no port is free")
