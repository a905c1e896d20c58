"""Parses and joins HOST:PORT addresses; an IPv6 host is written in brackets.

host, port = split_address("[::1]:1883", "broker.address")     # "::1", 1883
join_address(host, port + 1)                                   # "[::1]:1884"
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import closing

from treegrpo.errors import AddressInUseError, ConfigError

LARGEST_PORT = 65535


def split_address(address: str, key: str) -> tuple[str, int]:
    """HOST:PORT in two, the host without brackets. Raises ConfigError naming ``key``."""
    host, port = _parts(address)
    if host.startswith("[") and host.endswith("]") and _version(host[1:-1]) == 6:
        host = host[1:-1]
    elif _version(f"{host}:{port}") == 6 or _version(host) == 6:
        raise ConfigError(f"{key} = {address!r} is an IPv6 address without brackets; write [HOST]:PORT, like [::1]:9400.")
    if not host or set(host) & set("[]/ ") or not (port.isascii() and port.isdecimal()) or int(port) > LARGEST_PORT:
        raise ConfigError(f"{key} = {address!r} is not an address; write HOST:PORT with a port below 65536, like 127.0.0.1:9400.")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets where the host has colons."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_local(address: str) -> bool:
    """`is_loopback` for HOST:PORT."""
    return is_loopback(_bare(address))


def reachable_address(address: str) -> str:
    """The address of a listener for clients on this machine: loopback if it listens on all interfaces."""
    try:
        found = ipaddress.ip_address(_bare(address))
    except ValueError:
        return address
    port = _parts(address)[1]
    return f"{'127.0.0.1' if found.version == 4 else '[::1]'}:{port}" if found.is_unspecified else address


def check_port(address: str, key: str) -> None:
    """Raise ConfigError for port 0, which takes a free port that clients cannot know."""
    if split_address(address, key)[1] == 0:
        raise ConfigError(f"{key} = {address} has port 0, and the other processes would not know which that is; give a number.")


def share_port(one: str, other: str) -> bool:
    """Whether two listeners would share a port: on the same host, or where one listens on all."""
    (host, port), (host_2, port_2) = _parts(one), _parts(other)
    names = {_bare(one) if host != "localhost" else "127.0.0.1", _bare(other) if host_2 != "localhost" else "127.0.0.1"}
    return port == port_2 and (len(names) == 1 or not names.isdisjoint(("0.0.0.0", "::")))  # noqa: S104 - named, not bound


def check_free(address: str, key: str) -> None:
    """Raise AddressInUseError if another process listens on ``address``."""
    host, port = split_address(address, key)
    try:
        with closing(socket.socket(address_family(host), socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = "is taken by another process" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise AddressInUseError(f"{key} = {address} {reason}; stop that process or set {key} to another address.") from error


def address_family(host: str) -> socket.AddressFamily:
    """The address family to listen on ``host``: IPv4, unless it has only IPv6 addresses. Raises OSError for an unknown name."""
    families = {found[0] for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)}
    return socket.AF_INET if socket.AF_INET in families else socket.AF_INET6


def _parts(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    return host, port


def _bare(address: str) -> str:
    """The host of HOST:PORT without brackets; ``address`` need not be valid."""
    return _parts(address)[0].removeprefix("[").removesuffix("]")


def _version(host: str) -> int:
    """4 or 6 for an IP address, 0 for a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return 0
