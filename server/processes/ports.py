"""The ports of a service, which its workers share through SO_REUSEPORT."""

import errno
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager


class PortTaken(Exception):
    """A port cannot be used. The text is one line that names the setting."""


@contextmanager
def reserve_ports(host: str, ports: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Reserve `ports` (setting name -> number, 0 for any) for our workers; yield their numbers.

    Raises PortTaken if a port is in use, or if this process may not use the host or the port.
    """
    with ExitStack() as reserved:
        numbers = {}
        for setting, port in ports.items():
            try:
                holder = reserved.enter_context(_hold(host, port))
            except (OSError, UnicodeError) as error:
                raise PortTaken(_explain(error, setting, host, port)) from error
            numbers[setting] = holder.getsockname()[1]
        yield numbers


def listen(host: str, port: int) -> socket.socket:
    """Bind a worker's own socket to a reserved port; its server makes it listen.

    A name with several addresses means its first IPv4 one; `::` takes IPv4 as well. Raises OSError.
    """
    # SO_REUSEADDR, because connections inherit it: without it, those left in TIME_WAIT would keep
    # the next start from binding.
    return _bind(host, port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)


def _hold(host: str, port: int) -> socket.socket:
    """Bind a socket that never listens: it keeps other programs out and lets workers in."""
    # Whether Linux lets later sockets in depends on how the first one was bound, so SO_REUSEADDR is
    # used only if connections in TIME_WAIT may be in the way. A listener refuses both attempts.
    try:
        holder = _bind(host, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        holder = _bind(host, port, socket.SO_REUSEADDR)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    # Not set before binding, so that a listener is noticed; set now, so that workers can join.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return holder


def _bind(host: str, port: int, *options: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        for option in options:
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _explain(error: OSError | UnicodeError, setting: str, host: str, port: int) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"port {port} is already in use ({setting})"
    reason = error.strerror if isinstance(error, OSError) else "not a host name"
    return f"cannot listen on {host!r} port {port}: {reason} (HOST, {setting})"
