"""A network of two machines on one: a namespace that can lose its link, as by a loss of power."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_numbers = itertools.count()


@dataclass(frozen=True)
class Namespace:
    """A machine of its own, as far as its network goes; `host` is this machine's address there."""

    name: str
    host: str

    def wrap(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs another one in the namespace."""
        return ["ip", "netns", "exec", self.name, *command]

    def vanish(self) -> None:
        """Take the link away: no packet arrives or leaves any more, and no connection ends."""
        _run("ip", "-n", self.name, "link", "set", _inner(self.name), "down")

    def restore(self) -> None:
        """Bring the link back."""
        _run("ip", "-n", self.name, "link", "set", _inner(self.name), "up")


def _inner(name: str) -> str:
    return f"{name}-b"


def find_namespace_problem() -> str | None:
    """Return why no network namespace can be made here, or None if one can."""
    if not shutil.which("ip"):
        return "the program ip is missing"
    name = f"pgn{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return " ".join(made.stderr.split()) or "ip netns add failed"
    _run("ip", "netns", "delete", name)
    return None


@contextmanager
def opened_namespace() -> Iterator[Namespace]:
    """Yield a namespace with a link to this machine."""
    number = next(_numbers)
    name = f"pg{os.getpid()}-{number}"
    # A network of four addresses in 198.18.0.0/15, which is set aside for tests of networks.
    index = (os.getpid() * 64 + number) % 32_768
    prefix = f"198.{18 + index // 16_384}.{index // 64 % 256}"
    first = index % 64 * 4
    host, peer = f"{prefix}.{first + 1}", f"{prefix}.{first + 2}"
    outer, inner = f"{name}-a", _inner(name)
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        _run("ip", "address", "add", f"{host}/30", "dev", outer)
        _run("ip", "link", "set", outer, "up")
        _run("ip", "-n", name, "address", "add", f"{peer}/30", "dev", inner)
        _run("ip", "-n", name, "link", "set", inner, "up")
        yield Namespace(name, host)
    finally:
        # The link first: in the namespace, it would live for as long as any connection there.
        subprocess.run(["ip", "link", "delete", outer], capture_output=True, check=False)
        _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
